// The price history: points of one asset, the range that is shown, and when to ask for it.

import { ask, steady } from './server.js';

const TIMEOUT = 120;  // seconds
const RETRY = 15;  // seconds

// As in the server's history: one point a step, the last poll in it.
export function addPoint(points, [time, price], { step, seconds }) {
  if (points.length && Math.floor(points.at(-1)[0] / step) === Math.floor(time / step)) points.pop();
  points.push([time, price]);
  prune(points, time - seconds);
}

export function prune(points, start) {
  const first = points.findIndex(([time]) => time > start);
  points.splice(0, first < 0 ? points.length : first);
}

// A restarted server may have none.
export function mergePoints(own, points, until) {
  const first = points[0]?.[0] ?? Infinity, last = points.at(-1)?.[0] ?? -Infinity;
  const kept = own.filter(([time]) => time < first || (time > last && time <= until));
  return [...kept, ...points].sort((one, other) => one[0] - other[0]);
}

// `name`, or a day once there is more than an hour of history, or hardly a poll in an hour.
export function chooseRange({ ranges, interval_seconds: interval }, name, time) {
  const longest = Math.max(3 * interval, ...ranges.map(({ since }) => time - (since ?? Infinity)));
  return ranges.find((each) => each.name === name) ?? (longest > ranges[0].seconds ? ranges[1] : ranges[0]);
}

export class PriceHistory {
  range = null;
  chosen = null;
  #due = Infinity;
  #request = null;

  get isDue() { return this.#due < Infinity; }

  choose(range) {
    this.chosen = range;
    this.range ??= range;
    this.#request?.abort();
    this.#request = null;
    this.askSoon();
  }

  askSoon() {
    if (this.chosen) this.#due = 0;
  }

  forget() {
    this.#request?.abort();
    this.range = this.chosen = this.#request = null;
  }

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
