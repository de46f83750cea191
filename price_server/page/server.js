// The server as the page sees it: its clock, a request, one connection to its feed.

export const ASLEEP = 5;  // seconds that the clocks run apart in sleep
const LONGEST_TURN = 90;  // seconds: a browser runs a hidden page once a minute
const MAX_BACKOFF = 10;  // seconds

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

export function openConnection(kind, query, on) {
  const isSocket = kind === 'socket';
  const source = isSocket ? new WebSocket(socketAddress(document.baseURI) + query) : new EventSource(`stream${query}`);
  const connection = { kind, seen: new Set(), follows: null, close() { this.isClosed = true; source.close(); } };
  const unlessClosed = (action) => (event) => { if (!connection.isClosed) action(connection, event); };
  source.onopen = unlessClosed(on.opened);
  source.onmessage = unlessClosed(on.message);
  source[isSocket ? 'onclose' : 'onerror'] = unlessClosed(on.closed);
  return connection;
}
