// Alerts: a line for an asset. When the price crosses it, that is told once.

import { drawAlert, priceAt } from './chart.js';
import { formatPrice, formatTime, parsePrice, roundedPrice } from './format.js';
import { byId, setText } from './layout.js';
import { now } from './server.js';

const REARM = 0.001;  // of the line: how far the price must move to cross again
const NEWS = 3;

// Whether a price crossed the line, and the alert from then on. side: 1 above it, -1 below, 0 unknown.
export function watch(alert, price) {
  const side = Math.sign(price - alert.line) || alert.side;
  const crossed = alert.isArmed && alert.side * side === -1;
  const isFar = Math.abs(price / alert.line - 1) >= REARM;
  return { crossed, alert: { ...alert, side, isArmed: isFar || (alert.isArmed && !crossed) } };
}

export const newAlert = (line, price) => (
  { line, side: price ? Math.sign(price - line) : 0, isArmed: true, fired: null });

// Storage may be full or forbidden.
function inStorage(action) {
  try {
    return action(localStorage);
  } catch {
    return null;
  }
}

function readAlert(key) {
  const alert = inStorage((storage) => JSON.parse(storage.getItem(key)));
  return alert?.line > 0 ? alert : null;
}

// Returns whether it is stored.
const writeAlert = (key, alert) => inStorage((storage) => {
  if (alert) storage.setItem(key, JSON.stringify(alert));
  else storage.removeItem(key);
  return true;
});

let cannotConstruct = false;

function notificationTrouble() {
  if (!isSecureContext) return 'Browsers show notifications only for https pages and for localhost.';
  if (typeof Notification === 'undefined' || cannotConstruct) return 'This browser shows no notifications from a tab.';
  return Notification.permission === 'granted' ? '' : 'Notifications are blocked, or not allowed yet.';
}

function notify(text, tag) {
  if (notificationTrouble()) return;
  try {
    new Notification(text, { tag });
  } catch {
    cannotConstruct = true;  // Android
  }
}

export class Alerts {
  unseen = '';  // what crossed while nobody looked, for the title
  #health = null;
  #prefix = '';  // of the names in storage
  #isKept = true;
  #row = null;
  #form = byId('alert');
  #home = this.#form.parentElement;
  #field = byId('line');

  constructor(table) {
    this.table = table;
    byId('rows').addEventListener('click', (event) => this.#click(event));
    this.#form.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#set(parsePrice(this.#field.value));
    });
    this.#form.addEventListener('keydown', ({ key }) => { if (key === 'Escape') this.#close(); });
  }

  take(health) {
    const { rows } = this.table, prefix = `alert:${health.source}:${health.quote}:`;
    if (!rows.includes(this.#row)) this.#close();
    for (const row of rows) {
      if (prefix !== this.#prefix) row.alert = null;
      row.alert ??= readAlert(prefix + row.asset);
      this.#show(row);
    }
    [this.#health, this.#prefix] = [health, prefix];
  }

  // isAway: a crossing may have been missed.
  check(row, price, isAway) {
    const before = row.alert;
    if (!before) return;
    const { crossed, alert } = watch(before, price);
    if (crossed) alert.fired = { at: now(), isAway };
    else if (alert.side === before.side && alert.isArmed === before.isArmed) return;
    this.#put(row, alert);
    if (crossed) this.#tell(row, price, isAway);
  }

  #tell(row, price, isAway) {
    const line = formatPrice(row.alert.line, row.decimals), text = `${row.asset} crossed ${line}`;
    const told = `${text}${isAway ? ' while away' : `: ${formatPrice(price, row.decimals)}`}.`;
    const news = document.createElement('span');
    news.textContent = `${told} `;
    byId('news').append(news);
    while (byId('news').children.length > NEWS) byId('news').firstChild.remove();
    if (document.hidden) this.unseen = `${text} · `;
    // Not for the first price after loading.
    if (!isAway || row.at > -Infinity) notify(told, `${row.asset} ${line}`);
  }

  #show(row) {
    const { alert, parts } = row, line = alert && formatPrice(alert.line, row.decimals), fired = alert?.fired;
    const when = fired && (fired.isAway ? 'while away' : `at ${formatTime(fired.at, now(), {})}`);
    setText(parts.alert, !alert ? '' : fired ? `crossed ${line} ${when}` : `alert at ${line}`);
    row.tr.classList.toggle('fired', Boolean(fired));
    parts.bell.classList.toggle('set', Boolean(alert));
    drawAlert(row);
  }

  #click({ target, offsetY }) {
    const bell = target.closest('[data-part=bell]'), row = this.#row;
    if (target.id === 'close') this.#close();
    else if (target.id === 'remove') {
      this.#field.value = '';
      this.#put(row, null);
    } else if (bell) this.#toggle(this.table.rows.find(({ parts }) => parts.bell === bell));
    else if (target === row?.parts.chart && row.height > 0) {
      this.#set(roundedPrice(priceAt(row, offsetY / target.offsetHeight), row.height));
    }
  }

  #toggle(row) {
    const wasOpen = row === this.#row;
    this.#close();
    if (wasOpen) return;
    this.#row = row;
    if (row.alert?.fired) this.#put(row, { ...row.alert, fired: null });
    byId('news').replaceChildren();
    setText(byId('crosses'), `Alert when ${row.asset} crosses`);
    setText(byId('unit'), this.#health?.quote ?? '');
    this.#field.value = row.alert?.line ?? '';
    this.#tellWhatHappens();
    row.parts.cell.append(this.#form);
    this.#form.hidden = false;
    row.parts.bell.setAttribute('aria-expanded', 'true');
    this.#field.focus();
  }

  #close() {
    if (!this.#row) return;
    const { bell } = this.#row.parts, hadFocus = this.#form.contains(document.activeElement);
    this.#row = null;
    this.#form.hidden = true;
    this.#home.append(this.#form);  // otherwise it would go with its row
    bell.setAttribute('aria-expanded', 'false');
    if (hadFocus) bell.focus();
  }

  async #set(line) {
    const isPrice = line > 0, isFirst = !this.table.hasAlert;
    this.#field.setAttribute('aria-invalid', String(!isPrice));
    setText(byId('wrong'), isPrice ? '' : 'Not a price: type a number above 0, like 0.093.');
    if (!isPrice || !this.#prefix) return;
    this.#field.value = line;
    this.#put(this.#row, newAlert(line, this.#row.price));
    if (isFirst && isSecureContext && window.Notification?.permission === 'default') {
      await Notification.requestPermission();
      this.#tellWhatHappens();
    }
  }

  #put(row, alert) {
    row.alert = alert;
    this.#isKept = writeAlert(this.#prefix + row.asset, alert);
    this.#show(row);
    this.#tellWhatHappens();
  }

  #tellWhatHappens() {
    const trouble = notificationTrouble();
    const told = trouble ? `${trouble} A crossing shows here and in the title.` : 'A crossing also shows as a notification.';
    const kept = this.#isKept ? '' : ' It cannot be stored: it ends with this page.';
    setText(byId('how'), `Type a price, or click in the chart. ${told}${kept}`);
    byId('remove').hidden = !this.#row?.alert;
  }
}
