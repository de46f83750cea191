// The rows, their order, and what each says of its price.

import { commonDecimals, formatAge, formatChange, formatPrice, formatTime } from './format.js';
import { byId, getChoice, linkTo, setChoice, setText } from './layout.js';
import { now } from './server.js';

const TINT = 0.7;  // seconds, and at most a third of the interval
const GATHER = 25;  // milliseconds
const FILTERED = 15;  // rows: with more there is a filter
const WRONG = 300;  // seconds from the time of the poll; CoinAPI's lags by about 30 s
const DIRECTIONS = { '+': ['up', '▲'], '−': ['down', '▼'] };

function makeRow(asset) {
  const tr = byId('row').content.cloneNode(true).firstElementChild;
  const parts = Object.fromEntries([...tr.querySelectorAll('[data-part]')].map((part) => [part.dataset.part, part]));
  setText(parts.asset, asset);
  parts.chart.setAttribute('aria-label', `${asset} chart`);
  parts.bell.setAttribute('aria-label', `Alert for ${asset}`);
  return {
    asset, tr, parts, price: null, time: 0,  // time: CoinAPI's; 0 for none
    points: [],
    base: null, change: null,
    low: Infinity, high: -Infinity, decimals: 0, reading: null,
    alert: null, isAway: true, at: -Infinity,  // a crossing may have been missed since `at`
  };
}

// What is wrong with the time of each asset, and of all, by that of the poll.
export function findWrongTimes(times, polled) {
  const offsets = times.map((time) => (time ? time - polled : 0));
  const known = offsets.filter((_, i) => times[i]), low = Math.min(...known), high = Math.max(...known);
  if (known.length > 1 && high - low <= WRONG && Math.min(Math.abs(low), Math.abs(high)) > WRONG) {
    return { notes: times.map(() => ''), clocks: Math.abs(low + high) / 2 };
  }
  const tell = (offset) => `${formatAge(Math.abs(offset))} ${offset < 0 ? 'behind' : 'ahead'}`;
  return { notes: offsets.map((offset) => (Math.abs(offset) > WRONG ? tell(offset) : '')), clocks: 0 };
}

export function compareRows(by, way) {
  return (one, other) => {
    const [a, b] = [one[by], other[by]];
    if (a === null || b === null) return (a === null) - (b === null);
    return way * ((a > b) - (a < b));
  };
}

export class Table {
  rows = [];
  #body = byId('rows');
  #changed = new Set();
  #timer = 0;
  #tinted = [];
  #filter = '';
  #by = '';
  #way = 1;

  // on: arranged(), shown(), interval() in seconds
  constructor(on) {
    this.on = on;
    const [, sign, by] = /^(-?)(asset|price|change)$/.exec(getChoice('sort')) ?? [];
    if (by) [this.#by, this.#way] = [by, sign ? -1 : 1];
    this.#showSort();
    addEventListener('scroll', () => this.#flush());
  }

  find(asset) { return this.rows.find((row) => row.asset === asset); }
  get hasAlert() { return this.rows.some(({ alert }) => alert); }
  get shown() { return this.rows.filter((row) => !row.isFilteredOut); }

  arrange(assets) {
    this.rows = assets.map((asset) => this.find(asset) ?? makeRow(asset));
    this.link();
    this.#body.replaceChildren(...this.rows.map((row) => row.tr));
    this.filter(this.#filter);
    this.sort();
  }

  link() {
    byId('all').href = linkTo('');
    for (const { asset, parts } of this.rows) {
      if (this.rows.length > 1) parts.asset.href = linkTo(asset);
      else parts.asset.removeAttribute('href');
    }
  }

  filter(text) {
    this.#filter = text;
    for (const row of this.rows) row.tr.hidden = row.isFilteredOut = !row.asset.includes(text.trim().toUpperCase());
    byId('search').hidden = this.rows.length <= FILTERED;
    byId('unmatched').hidden = !this.rows.length || this.shown.length > 0;
    this.on.arranged();
  }

  // One way, the other way, then unsorted.
  sortBy(by) {
    const first = by === 'asset' ? 1 : -1;
    if (by !== this.#by) [this.#by, this.#way] = [by, first];
    else if (this.#way === first) this.#way = -first;
    else [this.#by, this.#way] = ['', 1];
    setChoice('sort', `${this.#by && this.#way < 0 ? '-' : ''}${this.#by}`);
    this.#showSort();
    this.link();
    this.sort();
  }

  sort() {
    const { children } = this.#body, sorted = this.rows.slice();
    if (this.#by) sorted.sort(compareRows(this.#by, this.#way));
    sorted.forEach(({ tr }, i) => { if (tr !== children[i]) this.#body.insertBefore(tr, children[i]); });
  }

  // Not while the pointer or the focus is in the table.
  sortUnlessUsed() {
    if (this.#by && !this.#body.matches(':hover, :focus-within')) this.sort();
  }

  #showSort() {
    for (const head of document.querySelectorAll('[data-sort]')) {
      const way = head.dataset.sort !== this.#by ? 'none' : this.#way > 0 ? 'ascending' : 'descending';
      head.setAttribute('aria-sort', way);
    }
  }

  // All of a poll at once.
  change(row, price, isNew) {
    row.price = price;
    row.isMoved ||= isNew;
    this.#changed.add(row);
    this.#timer ||= setTimeout(() => this.#flush(), GATHER);
  }

  // What is out of sight waits for a drawing or a scroll: each row costs a layout.
  #flush() {
    const seen = [...this.#changed].filter((row) => !row.shownPrice || isInSight(row.tr.getBoundingClientRect()));
    for (const row of seen) {
      this.show(row);
      this.#changed.delete(row);
    }
    this.#timer = 0;
    this.on.shown();
  }

  show(row) {
    const { price: part, change, trend, arrow, chart } = row.parts, { price, base } = row, before = part.textContent;
    row.decimals = commonDecimals([...row.points.slice(-19).map((point) => point[1]), price]);
    setText(part, formatPrice(price, row.decimals));
    if (row.isMoved && row.shownPrice && part.textContent !== before) this.#tint(part, price > row.shownPrice);
    row.shownPrice = price;
    row.isMoved = false;
    row.change = base ? price / base[1] - 1 : null;
    setText(change, base ? formatChange(row.change) : '–');
    const [direction, mark] = DIRECTIONS[change.textContent[0]] ?? ['', ''];
    if (trend.className !== direction) trend.className = chart.className = direction;
    setText(arrow, mark);
    showExtent(row);
  }

  #tint(part, isUp) {
    part.className = isUp ? 'up' : 'down';
    if (this.#tinted.push(part) > 1) return;
    const seconds = Math.min(TINT, this.on.interval() / 3);
    setTimeout(() => { while (this.#tinted.length) this.#tinted.pop().className = ''; }, seconds * 1000);
  }

  // Returns by how much all times are off, or 0.
  mark(isLive, polled, hasSeen) {
    const { notes, clocks } = findWrongTimes(this.rows.map(({ time }) => time), polled);
    this.rows.forEach((row, i) => {
      const note = !isLive ? '' : hasSeen(row.asset) ? notes[i] : tellLast(row);
      row.tr.classList.toggle('old', Boolean(note));
      setText(row.parts.note, note);
    });
    return isLive ? clocks : 0;
  }
}

const isInSight = ({ top, bottom }) => bottom >= 0 && top <= innerHeight;

function tellLast({ points }) {
  const last = points.at(-1);
  return last ? `no price since ${formatTime(last[0], now())}` : 'no price yet';
}

// No price shown in a row may be outside its low and high.
export function showExtent(row) {
  const shown = [row.price ?? row.low, row.reading?.[1] ?? row.low];
  row.low = Math.min(row.low, ...shown);
  row.high = Math.max(row.high, ...shown);
  const [low, high] = row.base ? [row.low, row.high].map((price) => formatPrice(price, row.decimals)) : ['', ''];
  setText(row.parts.low, low);
  setText(row.parts.high, high);
  setText(row.parts.extent, low && `low ${low} · high ${high}`);
}
