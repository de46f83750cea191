// The server as the page sees it: its clock, a request, its history, one connection to its feed.

export const ASLEEP = 5;  // seconds that the clocks run apart in sleep
const LONGEST_TURN = 90;  // seconds: a browser runs a hidden page once a minute
const MAX_BACKOFF = 10;  // seconds
const HISTORY_TIMEOUT = 120;  // seconds
const RETRY = 15;  // seconds

// In seconds. now() is the server's time; steady() may stand still in sleep.
const wall = () => Date.now() / 1000;
export const steady = () => performance.now() / 1000;
export const now = () => wall() + skew;

let skew = 0, last = { wall: wall(), steady: steady() };

export function followServer(time, at) {
  skew = time - at;
}

export function hasSlept() {
  const passed = { wall: wall() - last.wall, steady: steady() - last.steady };
  last = { wall: wall(), steady: steady() };
  return Math.abs(passed.wall - passed.steady) > ASLEEP || passed.steady > LONGEST_TURN;
}

// With jitter, because all pages return to a restarted server.
export const backoff = (failures, random = Math.random()) => (
  Math.min(2 ** failures / 4, MAX_BACKOFF) * (0.5 + random / 2));

// Beside the page, wherever a proxy put it.
export const socketAddress = (base) => new URL('ws', base).href.replace(/^http/, 'ws');

// As JSON, whatever the status; null when there is none in time.
export async function ask(path, seconds, controller = new AbortController()) {
  const timer = setTimeout(() => controller.abort(), seconds * 1000);
  try {
    return await (await fetch(path, { signal: controller.signal, cache: 'no-store' })).json();
  } catch {
    return null;
  } finally {
    clearTimeout(timer);
  }
}

export function openLine(kind, query, on) {
  const isSocket = kind === 'socket';
  const source = isSocket ? new WebSocket(socketAddress(document.baseURI) + query) : new EventSource(`stream${query}`);
  const line = { kind, seen: new Set(), follows: null, close() { this.isClosed = true; source.close(); } };
  const unlessClosed = (action) => (event) => { if (!line.isClosed) action(line, event); };
  source.onopen = unlessClosed(on.opened);
  source.onmessage = unlessClosed(on.message);
  source[isSocket ? 'onclose' : 'onerror'] = unlessClosed(on.closed);
  return line;
}

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

// `name`, or a day once there is more than an hour of past, or hardly a poll in an hour.
export function chooseRange({ ranges, interval_seconds: interval }, name, time) {
  const longest = Math.max(3 * interval, ...ranges.map(({ since }) => time - (since ?? Infinity)));
  return ranges.find((each) => each.name === name) ?? (longest > ranges[0].seconds ? ranges[1] : ranges[0]);
}

export class Past {
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
    const answer = await ask(`history?range=${range.name}${query}`, HISTORY_TIMEOUT, request);
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
