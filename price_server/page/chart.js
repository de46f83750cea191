// The charts: where a time and a price stand in one, its line, and the grid of a single one.

import { now } from './clock.js';
import { byId, setText } from './dom.js';
import { formatPrice, formatRoundTime, formatTime, roundPrices, roundTimes } from './format.js';
import { prune } from './history.js';
import { read } from './reading.js';
import { xOf, yOf } from './scale.js';
import { showExtent } from './table.js';

const SHORTEST = 300;  // seconds: ten of a server just started must not fill the whole width
const FLATTEST = 0.002;  // of the price, in the height of a chart: a stablecoin's noise must not look like a crash
const SLICE = 8;  // milliseconds that charts are drawn in one piece
const TIME_WIDTH = 90;  // pixels that a time on the axis of a single chart takes

export class Charts {
  #queue = [];
  #timer = 0;
  #rows = new Map();  // by their elements
  #observer = new IntersectionObserver((entries) => this.#move(entries), { rootMargin: '50%' });

  // onNear(): rows came near to what is in sight, and are to be drawn.
  constructor(onNear) {
    this.onNear = onNear;
  }

  watch(rows) {
    this.#rows = new Map(rows.map((row) => [row.tr, row]));
    for (const tr of this.#rows.keys()) this.#observer.observe(tr);
  }

  #move(entries) {
    for (const { target, isIntersecting } of entries) {
      const row = this.#rows.get(target);
      if (row) row.isFar = !isIntersecting;
    }
    if (entries.some(({ isIntersecting }) => isIntersecting)) this.onNear();
  }

  // view: rows, range, polled, stale: seconds after which prices are, interval, drawn()
  draw(view) {
    const { rows, range, stale } = view;
    const end = Math.min(now(), view.polled + stale);  // without prices time stands still
    for (const { points } of rows) prune(points, end - range.seconds);
    const oldest = Math.min(end, ...rows.map(({ points }) => (points.length ? points[0][0] : end)));
    const late = 1.5 * Math.max(range.step, view.interval);  // how late the first point of a full range may be
    const isFull = oldest <= end - range.seconds + late;
    const start = isFull ? end - range.seconds : Math.min(oldest, end - SHORTEST);
    const since = { timeZoneName: undefined };
    setText(byId('period'), isFull ? range.name.replace(/\D/, ' $&') : `since ${formatTime(oldest, now(), since)}`);
    setText(byId('from'), formatTime(start, now()));
    setText(byId('to'), formatTime(end, now()));
    clearTimeout(this.#timer);
    const gap = 1.5 * range.step + stale;  // a line across it would show prices that nobody knew
    const scale = { start, end, gap, late: oldest + late, isAlone: rows.length === 1 };
    for (const row of rows) setScale(row, scale);
    this.#queue = rows.filter((row) => !row.isFar || !row.isDrawn).map((row) => () => drawChart(row, scale));
    this.#queue.push(view.drawn);
    this.#drawSlice();
  }

  // In slices, or prices would wait for two hundred charts.
  #drawSlice() {
    const until = performance.now() + SLICE;
    do this.#queue.shift()(); while (this.#queue.length && performance.now() < until);
    if (this.#queue.length) this.#timer = setTimeout(() => this.#drawSlice(), 16);
  }
}

function setScale(row, { start, end }) {
  const { points } = row;
  let low = Infinity, high = -Infinity;
  for (const [, price] of points) [low, high] = [Math.min(low, price), Math.max(high, price)];
  const height = Math.max(high - low, FLATTEST * high), top = (high + low + height) / 2;
  Object.assign(row, { start, end, low, high, top, height, base: points.length > 1 ? points[0] : null });
}

function drawChart(row, scale) {
  const { points, parts } = row, { start, gap, late, isAlone } = scale;
  setScale(row, scale);  // again: points may have come since the first slice
  let line = '', area = '', before = -Infinity;
  row.isDrawn = points.length > 0;
  const ground = points.length ? yOf(row, points[0][1]) : '';
  for (const [time, price] of points) {
    const at = `${xOf(row, time)} ${yOf(row, price)}`, isNew = time - before > gap;
    line += isNew ? `M${at}h0` : `L${at}`;  // h0: one point alone is a dot
    area += isNew ? `${area && `V${ground}`}M${xOf(row, time)} ${ground}L${at}` : `L${at}`;
    before = time;
  }
  parts.line.setAttribute('d', line);
  parts.area.setAttribute('d', area && `${area}V${ground}`);
  parts.base.setAttribute('d', line && `M${xOf(row, points[0][0])} ${ground}H${xOf(row, before)}`);
  setText(parts.since, row.base?.[0] > late ? `since ${formatTime(row.base[0], now(), {})}` : '');
  drawAlert(row);
  drawGrid(row, isAlone);
  showExtent(row);
  read(row, row.reading?.[0] < start ? null : row.reading);
}

// Where the line of an alert is within the chart; the row tells it in any case.
export function drawAlert(row) {
  const { alert, height } = row, y = alert && height > 0 ? Number(yOf(row, alert.line)) : -1;
  row.parts.limit.setAttribute('d', y >= 0 && y <= 100 ? `M0 ${y}H1000` : '');
}

// With labels, which are no part of the drawing: that is stretched.
function drawGrid(row, isAlone) {
  const { parts, start, end, top, height } = row, labels = [];
  let path = '';
  if (isAlone && height > 0) {
    const most = Math.min(Math.max(Math.floor(parts.chart.clientWidth / TIME_WIDTH) - 1, 2), 6);
    const prices = roundPrices(top - height, top), times = roundTimes(start, end, most);
    const decimals = Math.max(...prices.map((price) => (String(price).split('.')[1] ?? '').length));
    for (const price of prices) {
      path += `M0 ${yOf(row, price)}H1000`;
      labels.push(makeLabel('at-price', formatPrice(price, Math.min(decimals, row.decimals)), 'top', yOf(row, price)));
    }
    for (const time of times) {
      path += `M${xOf(row, time)} 0V100`;
      labels.push(makeLabel('at-time', formatRoundTime(time, end - start), 'left', xOf(row, time) / 10));
    }
  }
  parts.grid.setAttribute('d', path);
  parts.labels.replaceChildren(...labels);
}

function makeLabel(kind, text, side, percent) {
  const label = document.createElement('span');
  label.className = kind;
  label.textContent = text;
  label.style[side] = `${percent}%`;
  return label;
}
