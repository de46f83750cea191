// The page as a whole: its elements, its address, its state in words, and how the rows use the window.

import { formatAge, formatTime } from './format.js';
import { now } from './server.js';

const STATES = {  // in the page and in its title
  connecting: ['Connecting …'], starting: ['Waiting for the first prices'], live: ['Live'], stale: ['Stale', 'STALE '],
  lost: ['Connection lost, reconnecting', 'LOST '], full: ['The server is full', 'FULL '],
  blocked: ['No live prices', 'NOT LIVE '], paused: ['Paused', 'PAUSED '] };
const FEW = 3, MANY = 15;  // rows: up to FEW are shown large, and above MANY there is a filter
const WALL = { width: 1600, height: 900, rows: 12 };  // read from afar
const STACKED = 40, TIGHT = 17;  // rem: below, the chart, the change stand under the rest
const LOWEST = { row: 2.6, wall: 2.1, stacked: 3.2 }, HIGHEST = { row: 34, wall: 34, stacked: 40 };  // rem
const MEASURED = 40;  // rows: with more the charts cannot grow

export const byId = (id) => document.getElementById(id);

// Only a change: otherwise a screen reader would say the same again, and the browser lay it out again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const address = new URL(location.href);  // ?assets=ETH,BTC&range=24h&sort=-price

// In this order; each once.
export const wanted = [...new Set(
  address.searchParams.getAll('assets').join().toUpperCase().split(/[\s,]+/).filter(Boolean))];

export const getChoice = (name) => address.searchParams.get(name) ?? '';

const withChoice = (url, name, value) => {
  if (value) url.searchParams.set(name, value);
  else url.searchParams.delete(name);
  return url.href.replace(/%2C/g, ',');
};

// Without an entry in the browser's history: "back" leaves the page.
export const setChoice = (name, value) => history.replaceState(null, '', withChoice(address, name, value));

// This view with other assets, joined by commas; all for ''.
export const linkTo = (assets) => `?${withChoice(new URL(address.href), 'assets', assets).split('?')[1] ?? ''}`;

export function stateOf(feed, rows, isStale) {
  if (!feed.isServed) return feed.phase === 'paused' ? 'paused' : feed.trouble;
  if (feed.health?.age_seconds === null && !rows.some(({ asset }) => feed.hasSeen(asset))) return 'starting';
  if (feed.polled === -Infinity) return 'connecting';
  return isStale ? 'stale' : 'live';
}

export function titleOf(state, unseen, isDemo, top) {
  const [, mark = isDemo ? 'DEMO ' : ''] = STATES[state];
  return unseen + mark + (top?.price ? `${top.parts.price.textContent} ${top.asset}` : 'Prices');
}

export function showState(state, health, age, polled) {
  document.body.dataset.state = state;
  setText(byId('state'), STATES[state][0]);
  const since = age < 600 ? '' : `, of ${formatTime(polled, now())}`;
  setText(byId('age'), age < Infinity ? `prices ${formatAge(age)} old${since}` : '');
  setText(byId('error'), health?.last_error ? `Last error: ${health.last_error}` : '');
}

let pending = 0;

// Once a frame: each time is a layout of all rows.
export function fitSoon(rows) {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => fit(rows()));
}

function fit(rows) {
  const { body, documentElement: root } = document, count = rows.length;
  const isWall = innerWidth >= WALL.width && innerHeight >= WALL.height && count <= WALL.rows;
  root.classList.toggle('wall', isWall);
  const rem = parseFloat(getComputedStyle(root).fontSize);
  const setHeight = (pixels) => root.style.setProperty('--chart', `${Math.floor(pixels)}px`);
  body.classList.toggle('few', count <= FEW);
  body.classList.toggle('alone', count === 1);
  body.classList.remove('stacked', 'tight');
  setHeight(LOWEST.wall * rem);
  const isStacked = count <= FEW || body.clientWidth < STACKED * rem || root.scrollWidth > root.clientWidth;
  const kind = isStacked ? 'stacked' : isWall ? 'wall' : 'row', lowest = LOWEST[kind] * rem;
  body.classList.toggle('stacked', isStacked);
  body.classList.toggle('tight', body.clientWidth < TIGHT * rem);
  setHeight(lowest);
  if (count && count <= MEASURED) {
    // A pixel less: browsers round the height of each row, and the page would scroll.
    const free = (innerHeight - Math.ceil(body.getBoundingClientRect().height)) / count - 1;
    setHeight(Math.min(lowest + Math.max(free, 0), HIGHEST[kind] * rem));
  }
  keepInSight(root, rem);
}

// Nothing with the focus ends behind the header, of which only the state stays in a narrow window.
function keepInSight(root, rem) {
  const header = byId('header'), above = byId('status').offsetTop - 0.3 * rem;  // within the header
  const hidden = above > 1.2 * rem ? Math.floor(above) : 0;
  header.style.top = `${-hidden}px`;
  root.style.scrollPaddingTop = `${header.offsetHeight - hidden + 2 * rem}px`;
}

export function showFilter(count) {
  byId('search').hidden = count <= MANY;
}
