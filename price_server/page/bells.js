// The alerts of the rows: the form that sets one, what a row says of it, and telling that a line was crossed.

import { AlertStore, askForNotifications, newAlert, notificationTrouble, notify, watch } from './alerts.js';
import { drawAlert } from './chart.js';
import { now } from './clock.js';
import { byId, setText } from './dom.js';
import { formatPrice, formatTime, parsePrice, roundedPrice } from './format.js';
import { priceAt } from './scale.js';

const NEWS = 3;  // crossings that stand above the table

export class Bells {
  unseen = '';  // what crossed while nobody looked, for the title
  #store = null;
  #health = null;
  #row = null;  // that the form is open for
  #form = byId('alert');
  #home = this.#form.parentElement;
  #field = byId('line');

  constructor(table) {
    this.table = table;
    const body = byId('rows');
    body.addEventListener('click', (event) => this.#click(event.target, event));
    this.#form.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#set(parsePrice(this.#field.value));
    });
    this.#form.addEventListener('keydown', ({ key }) => { if (key === 'Escape') this.#close(); });
  }

  get isAnySet() { return this.table.rows.some(({ alert }) => alert); }

  // With each answer of /healthz: which alerts there are depends on source and quote.
  take(health) {
    if (health.source !== this.#health?.source || health.quote !== this.#health?.quote) {
      this.#store = new AlertStore(health);
      for (const row of this.table.rows) row.alert = null;
    }
    this.#health = health;
    if (this.#row && !this.table.rows.includes(this.#row)) this.#close();
    for (const row of this.table.rows) {
      row.alert ??= this.#store.read(row.asset);
      this.#show(row);
    }
  }

  // `price` is current; isAway: a crossing before it may have been missed.
  check(row, price, isAway) {
    if (!row.alert || !this.#store) return;
    const { crossed, alert } = watch(row.alert, price);
    if (crossed) alert.fired = { at: now(), isAway };
    const isChanged = crossed || alert.side !== row.alert.side || alert.isArmed !== row.alert.isArmed;
    row.alert = alert;
    if (!isChanged) return;
    this.#store.write(row.asset, alert);
    this.#show(row);
    if (crossed) this.#tell(row, price, isAway);
  }

  seen() {
    this.unseen = '';
  }

  #tell(row, price, isAway) {
    const line = formatPrice(row.alert.line, row.decimals), text = `${row.asset} crossed ${line}`;
    const news = document.createElement('span');
    news.textContent = isAway ? `${text} while away. ` : `${text}: ${formatPrice(price, row.decimals)}. `;
    byId('news').append(news);
    while (byId('news').children.length > NEWS) byId('news').firstChild.remove();
    if (document.hidden) this.unseen = `${text} · `;
    // The first price after loading tells somebody who looks at the page.
    if (!isAway || row.at > -Infinity) notify(news.textContent.trim(), `${row.asset} ${line}`);
  }

  #show(row) {
    const { alert, parts } = row, line = alert && formatPrice(alert.line, row.decimals);
    const when = alert?.fired && (alert.fired.isAway ? 'while away' : `at ${formatTime(alert.fired.at, now(), {})}`);
    setText(parts.alert, !alert ? '' : alert.fired ? `crossed ${line} ${when}` : `alert at ${line}`);
    row.tr.classList.toggle('fired', Boolean(alert?.fired));
    parts.bell.classList.toggle('set', Boolean(alert));
    drawAlert(row);
  }

  #click(target, event) {
    const bell = target.closest('[data-part=bell]'), remove = target.closest('#remove');
    if (target.closest('#close')) this.#close();
    else if (remove) this.#put(null);
    else if (bell) this.#toggle(this.table.rows.find(({ parts }) => parts.bell === bell));
    else if (this.#row && target === this.#row.parts.chart && this.#row.height > 0) {
      const price = priceAt(this.#row, event.offsetY / target.offsetHeight);
      this.#set(roundedPrice(price, this.#row.height));
    }
  }

  #toggle(row) {
    if (row === this.#row) return this.#close();
    this.#close();
    this.#row = row;
    if (row.alert?.fired) this.#put({ ...row.alert, fired: null });  // it has been seen
    byId('news').replaceChildren();
    setText(byId('crosses'), `Alert when ${row.asset} crosses`);
    setText(byId('unit'), this.#health?.quote ?? '');
    this.#field.value = row.alert ? String(row.alert.line) : '';
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
    const isPrice = line > 0;
    this.#field.setAttribute('aria-invalid', String(!isPrice));
    setText(byId('wrong'), isPrice ? '' : 'Not a price: type a number above 0, like 70000 or 0.093.');
    if (!isPrice || !this.#store) return;
    const isFirst = !this.isAnySet;
    this.#field.value = String(line);
    this.#put(newAlert(line, this.#row.price));
    if (isFirst) await askForNotifications();
    this.#tellWhatHappens();
  }

  #put(alert) {
    const row = this.#row;
    row.alert = alert;
    this.#store?.write(row.asset, alert);
    if (!alert) this.#field.value = '';
    this.#show(row);
    this.#tellWhatHappens();
  }

  #tellWhatHappens() {
    const isSet = Boolean(this.#row?.alert);
    byId('remove').hidden = !isSet;
    const trouble = notificationTrouble();
    const told = trouble ? `${trouble} A crossing shows here and in the title.` : 'A crossing also shows as a notification.';
    const kept = this.#store?.isKept === false ? ' It cannot be stored: it ends with this page.' : '';
    setText(byId('how'), `${isSet ? 'Set. ' : ''}Type a price, or click in the chart. ${told}${kept}`);
  }
}
