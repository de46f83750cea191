// What the page asks of the server: one connection to the feed, or one request.

const MAX_BACKOFF = 10;  // seconds between two attempts to connect

// Seconds until the next attempt. Jitter: otherwise every page of a server that was restarted would return in one moment.
export const backoff = (failures, random = Math.random()) => (
  Math.min(2 ** failures / 4, MAX_BACKOFF) * (0.5 + random / 2));

// Beside the page, wherever a proxy put it: another host, a path before it, TLS.
export const socketAddress = (base) => new URL('ws', base).href.replace(/^http/, 'ws');

// The answer as JSON, whatever its status: /healthz says 503 while prices are stale. Null when there is none in time.
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

// One connection to the feed, by WebSocket or /stream. Each of `on` is called until close().
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
