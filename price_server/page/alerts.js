// Alerts: a line for an asset. When the price crosses it, that is told once.

const REARM = 0.001;  // of the line, that a price must be away from it before the next crossing counts

// What a price does to an alert { line, side, isArmed }: whether it crossed, and the alert from then on.
// side: 1 above the line, -1 below, 0 not known yet.
export function watch(alert, price) {
  const side = Math.sign(price - alert.line) || alert.side;
  const crossed = alert.isArmed && alert.side * side === -1;
  const isAway = Math.abs(price / alert.line - 1) >= REARM;
  return { crossed, alert: { ...alert, side, isArmed: isAway || (alert.isArmed && !crossed) } };
}

export function newAlert(line, price) {
  return { line, side: price ? Math.sign(price - line) : 0, isArmed: true, fired: null };
}

const isAlert = (alert) => alert?.line > 0 && alert.line < Infinity && [-1, 0, 1].includes(alert.side);

// Storage may be full, forbidden, or hold what another program left: alerts then last as long as the page.
export class AlertStore {
  #prefix;
  isKept = true;

  constructor({ source, quote }) {
    this.#prefix = `alert:${source}:${quote}:`;
  }

  read(asset) {
    try {
      const alert = JSON.parse(localStorage.getItem(this.#prefix + asset));
      return isAlert(alert) ? alert : null;
    } catch {
      return null;
    }
  }

  write(asset, alert) {
    try {
      if (alert) localStorage.setItem(this.#prefix + asset, JSON.stringify(alert));
      else localStorage.removeItem(this.#prefix + asset);
      this.isKept = true;
    } catch {
      this.isKept = false;
    }
  }
}

let cannotConstruct = false;

// What this browser does when a line is crossed, in words; '' when it shows a notification.
export function notificationTrouble() {
  if (!isSecureContext) return 'Browsers show notifications only for https pages and for localhost.';
  if (typeof Notification === 'undefined' || cannotConstruct) return 'This browser shows no notifications from a tab.';
  if (Notification.permission === 'denied') return 'Notifications of this page are blocked in the browser.';
  return Notification.permission === 'granted' ? '' : 'Notifications of this page are not allowed yet.';
}

export async function askForNotifications() {
  if (isSecureContext && typeof Notification !== 'undefined' && Notification.permission === 'default') {
    await Notification.requestPermission();
  }
}

export function notify(text, tag) {
  if (notificationTrouble()) return;
  try {
    new Notification(text, { tag });  // two tabs show one
  } catch {
    cannotConstruct = true;  // Android
  }
}
