// Reading a chart: the point that the pointer or a key is at.

import { now } from './clock.js';
import { setText } from './dom.js';
import { formatPrice, formatTime } from './format.js';
import { xOf, yOf } from './scale.js';
import { showExtent } from './table.js';

const STEPS = {  // points that a key moves by
  ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -36, PageUp: 36, Home: -1e9, End: 1e9 };

let quote = '', hasSeconds = false;

export function setReading(view) {
  ({ quote, hasSeconds } = view);
}

const indexAt = (points, time) => points.reduce((best, point, i) => (
  Math.abs(point[0] - time) < Math.abs(points[best][0] - time) ? i : best), 0);

// A point that is read stays the same until another one is: nothing moves under a reader. `point` null: none is read.
export function read(row, point) {
  const { chart, cross, dot, reading, text } = row.parts, wasRead = row.reading;
  row.reading = point;
  reading.hidden = !point;
  if (!row.points.length) return;
  const [time, price] = point ?? row.points[row.points.length - 1];
  const shown = formatPrice(price, row.decimals);
  const at = formatTime(time, now(), { timeZoneName: 'short', second: hasSeconds ? '2-digit' : undefined });
  chart.setAttribute('aria-valuemin', Math.round(row.start));
  chart.setAttribute('aria-valuemax', Math.round(row.end));
  chart.setAttribute('aria-valuenow', Math.round(time));
  chart.setAttribute('aria-valuetext', `${shown} ${quote} at ${at}`);
  if (!point && !wasRead) return;
  const x = xOf(row, time);
  cross.setAttribute('d', point ? `M${x} 0V100` : '');
  dot.setAttribute('d', point ? `M${x} ${yOf(row, price)}h0` : '');
  if (!point) return;
  setText(text, `${shown} · ${at}`);
  showExtent(row);
  // Over the point, but never past an edge: on a phone the page would scroll sideways.
  const width = reading.offsetWidth;
  reading.style.left = `clamp(0px, ${x / 10}% - ${width / 2}px, 100% - ${width}px)`;
}

function readBy(table, event) {
  const { type, key, target: chart } = event, row = table.rows.find(({ parts }) => parts.chart === chart);
  if (!(row?.height > 0)) return;  // nothing is drawn
  const { points, reading, start, end } = row, last = points.length - 1;
  if (last < 0) return;
  // A finger leaves when it is lifted: what it read stays until it touches another place.
  const isGone = type === 'pointerout' && event.pointerType === 'mouse' && !chart.matches(':focus-visible');
  if (type === 'focusin') read(row, reading ?? points[last]);
  else if (type === 'focusout' || key === 'Escape' || isGone) read(row, null);
  else if (key in STEPS && !event.altKey && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    const index = (reading ? indexAt(points, reading[0]) : last) + STEPS[key];
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
