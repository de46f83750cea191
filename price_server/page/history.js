// The history: the points of each row, and the request for those that the server has.

import { now, steady } from './clock.js';
import { ask } from './line.js';

const TIMEOUT = 120;  // seconds, on a slow line; the prices do not wait for it
const RETRY = 15;  // seconds between two tries

// As in the server's history: one point a step, the last poll in it; what is older than the range is removed.
export function addPoint(points, [time, price], { step, seconds }) {
  if (points.length && Math.floor(points[points.length - 1][0] / step) === Math.floor(time / step)) points.pop();
  points.push([time, price]);
  prune(points, time - seconds);
}

export function prune(points, start) {
  const first = points.findIndex(([time]) => time > start);
  points.splice(0, first < 0 ? points.length : first);
}

// A server without a history file starts with none when it is restarted: the page keeps its own points.
export function mergePoints(own, points, until) {
  const first = points.length ? points[0][0] : Infinity, last = points.length ? points[points.length - 1][0] : -Infinity;
  const kept = own.filter(([time]) => time < first || (time > last && time <= until));
  return [...kept, ...points].sort((one, other) => one[0] - other[0]);
}

// A day as soon as there is more than an hour of past, or an hour has hardly a poll, unless `name` says another.
export function chooseRange({ ranges, interval_seconds: interval }, name, time) {
  const longest = Math.max(3 * interval, ...ranges.map(({ since }) => time - (since ?? Infinity)));
  return ranges.find((each) => each.name === name) ?? (longest > ranges[0].seconds ? ranges[1] : ranges[0]);
}

export class Past {
  range = null;  // one of those in /healthz: that of the points in the rows
  chosen = null;  // the one to be shown
  #due = Infinity;  // when to ask, by steady(); Infinity once it was asked
  #request = null;

  get isDue() { return this.#due < Infinity; }

  choose(range) {
    this.chosen = range;
    this.range ??= range;
    this.#request?.abort();
    this.#request = null;
    this.askSoon();
  }

  // For what was missed.
  askSoon() {
    if (this.chosen) this.#due = 0;
  }

  forget() {
    this.#request?.abort();
    this.range = this.chosen = this.#request = null;
  }

  // The points by asset, or null when there is nothing new.
  async load(query) {
    if (this.#request || steady() < this.#due) return null;
    const request = this.#request = new AbortController(), range = this.chosen;
    this.#due = Infinity;
    const answer = await ask(`history?range=${range.name}${query}`, TIMEOUT, request);
    if (request !== this.#request) return null;
    this.#request = null;
    if (!answer || 'error' in answer) {
      this.#due = steady() + RETRY;
      return null;
    }
    this.range = range;
    return answer;
  }
}

// What `answer` has for each row.
export function takePast(rows, answer) {
  for (const row of rows) row.points = mergePoints(row.points, answer[row.asset] ?? [], now());
}
