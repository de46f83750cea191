// The charts: their lines, the grid of a single one, and reading a point.

import { formatPrice, formatRoundTime, formatTime, roundPrices, roundTimes } from './format.js';
import { prune } from './history.js';
import { byId, setText } from './layout.js';
import { now } from './server.js';
import { showExtent } from './table.js';

const SHORTEST = 300;  // seconds, of a server just started
const FLATTEST = 0.002;  // of the price, for stablecoins
const SLICE = 8;  // milliseconds, as prices must not wait
const KEYS = {
  ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -36, PageUp: 36, Home: -1e9, End: 1e9 };

export const xOf = (row, time) => ((1000 * (time - row.start)) / (row.end - row.start)).toFixed(1);
export const yOf = (row, price) => (4 + (92 * (row.top - price)) / row.height).toFixed(1);
export const priceAt = (row, share) => row.top - ((100 * share - 4) * row.height) / 92;

let quote = '', hasSeconds = false, timer = 0;

const setPath = (part, path) => part.setAttribute('d', path);

// view: range, polled, stale, interval, quote
export function drawCharts(table, view) {
  const { rows } = table, { range, stale } = view;
  [quote, hasSeconds] = [view.quote, range.step < 60];
  const end = Math.min(now(), view.polled + stale);  // without prices time stands still
  for (const { points } of rows) prune(points, end - range.seconds);
  const oldest = Math.min(end, ...rows.map(({ points }) => points[0]?.[0] ?? end));
  const late = 1.5 * Math.max(range.step, view.interval);
  const isFull = oldest <= end - range.seconds + late;
  const start = isFull ? end - range.seconds : Math.min(oldest, end - SHORTEST);
  setText(byId('period'), isFull ? range.name.replace(/\D/, ' $&') : `since ${formatTime(oldest, now(), {})}`);
  setText(byId('from'), formatTime(start, now()));
  setText(byId('to'), formatTime(end, now()));
  const gap = 1.5 * range.step + stale;  // without a line
  const scale = { start, end, gap, late: oldest + late, isAlone: rows.length === 1 };
  clearTimeout(timer);
  drawSlice(table, scale, rows.slice());
}

function drawSlice(table, scale, rows) {
  const until = performance.now() + SLICE;
  while (rows.length && performance.now() < until) {
    const row = rows.shift();
    drawChart(row, scale);
    if (row.price !== null) table.show(row);
  }
  if (rows.length) timer = setTimeout(drawSlice, 16, table, scale, rows);
  else table.sortUnlessUsed();
}

function setScale(row, { start, end }) {
  const { points } = row;
  let low = Infinity, high = -Infinity;
  for (const [, price] of points) {
    if (price < low) low = price;
    if (price > high) high = price;
  }
  const height = Math.max(high - low, FLATTEST * high), top = (high + low + height) / 2;
  Object.assign(row, { start, end, low, high, top, height, base: points.length > 1 ? points[0] : null });
}

function drawChart(row, scale) {
  setScale(row, scale);
  const { start, gap, late, isAlone } = scale;
  const { points, parts } = row, ground = points.length && yOf(row, points[0][1]);
  let line = '', area = '', before = -Infinity;
  for (const [time, price] of points) {
    const x = xOf(row, time), at = `${x} ${yOf(row, price)}`, isNew = time - before > gap;
    line += isNew ? `M${at}h0` : `L${at}`;
    area += isNew ? `${area && `V${ground}`}M${x} ${ground}L${at}` : `L${at}`;
    before = time;
  }
  setPath(parts.line, line);
  setPath(parts.area, area && `${area}V${ground}`);
  setPath(parts.base, line && `M${xOf(row, points[0][0])} ${ground}H${xOf(row, before)}`);
  setText(parts.since, row.base?.[0] > late ? `since ${formatTime(row.base[0], now(), {})}` : '');
  drawAlert(row);
  drawGrid(row, isAlone);
  showExtent(row);
  read(row, row.reading?.[0] < start ? null : row.reading);
}

export function drawAlert(row) {
  const { alert, height } = row, y = alert && height > 0 ? Number(yOf(row, alert.line)) : -1;
  setPath(row.parts.limit, y >= 0 && y <= 100 ? `M0 ${y}H1000` : '');
}

function drawGrid(row, isAlone) {
  const { parts, start, end, top, height } = row, labels = [];
  const addLabel = (className, textContent, side, percent) => {
    labels.push(Object.assign(document.createElement('span'), { className, textContent }));
    labels.at(-1).style[side] = `${percent}%`;
  };
  let path = '';
  if (isAlone && height > 0) {
    for (const price of roundPrices(top - height, top)) {
      path += `M0 ${yOf(row, price)}H1000`;
      addLabel('at-price', formatPrice(price), 'top', yOf(row, price));
    }
    for (const time of roundTimes(start, end)) {
      path += `M${xOf(row, time)} 0V100`;
      addLabel('at-time', formatRoundTime(time, end - start), 'left', xOf(row, time) / 10);
    }
  }
  setPath(parts.grid, path);
  parts.labels.replaceChildren(...labels);
}

const indexAt = (points, time) => points.reduce((best, point, i) => (
  Math.abs(point[0] - time) < Math.abs(points[best][0] - time) ? i : best), 0);

// `point` null: none is read.
function read(row, point) {
  const { chart, cross, dot, reading, text } = row.parts, { points } = row, wasRead = row.reading;
  row.reading = point;
  reading.hidden = !point;
  if (!points.length) return;
  const [time, price] = point ?? points.at(-1), shown = formatPrice(price, row.decimals);
  const at = formatTime(time, now(), { timeZoneName: 'short', second: hasSeconds ? '2-digit' : undefined });
  const values = { min: Math.round(row.start), max: Math.round(row.end), now: Math.round(time) };
  for (const [name, value] of Object.entries(values)) chart.setAttribute(`aria-value${name}`, value);
  chart.setAttribute('aria-valuetext', `${shown} ${quote} at ${at}`);
  if (!point && !wasRead) return;
  const x = xOf(row, time);
  setPath(cross, point ? `M${x} 0V100` : '');
  setPath(dot, point ? `M${x} ${yOf(row, price)}h.01` : '');
  if (!point) return;
  setText(text, `${shown} · ${at}`);
  showExtent(row);
  // Never past an edge.
  reading.style.left = `${x / 10}%`;
  reading.style.transform = `translateX(${-x / 10}%)`;
}

function readBy(table, event) {
  const { type, key, target: chart } = event, row = table.rows.find(({ parts }) => parts.chart === chart);
  if (!(row?.height > 0)) return;
  const { points, reading, start, end } = row, last = points.length - 1;
  // What a finger read stays when it is lifted.
  const isGone = type === 'pointerout' && event.pointerType === 'mouse' && !chart.matches(':focus-visible');
  if (type === 'focusin') read(row, reading ?? points[last]);
  else if (type === 'focusout' || key === 'Escape' || isGone) read(row, null);
  else if (key in KEYS && !event.altKey && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    const index = (reading ? indexAt(points, reading[0]) : last) + KEYS[key];
    read(row, points[Math.min(Math.max(index, 0), last)]);
  } else if (type === 'pointermove' || type === 'pointerdown') {
    read(row, points[indexAt(points, start + (event.offsetX / chart.offsetWidth) * (end - start))]);
    if (type === 'pointerdown') chart.focus({ preventScroll: true, focusVisible: false });
  }
}

export function startReading(table, body) {
  for (const type of ['pointermove', 'pointerdown', 'pointerout', 'focusin', 'focusout', 'keydown']) {
    body.addEventListener(type, (event) => readBy(table, event));
  }
}
