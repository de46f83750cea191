// The page as a whole: its address, its state in words, and how the rows use the window.

import { formatAge, formatPrice, formatTime } from './format.js';
import { now } from './server.js';

const STATES = {  // in the page and in its title
  connecting: ['Connecting …'], starting: ['Waiting for the first prices'], live: ['Live'], stale: ['Stale', 'STALE '],
  lost: ['Connection lost, reconnecting', 'LOST '], full: ['The server is full', 'FULL '],
  blocked: ['No live prices', 'NOT LIVE '], paused: ['Paused', 'PAUSED '] };
const FEW = 3, MANY = 30;  // rows: up to 3 are large; above 30 no chart grows
const WALL = { width: 1600, height: 900, rows: 12 };  // read from afar
const STACKED = 40;  // rem: below, the chart stands under the rest

export const byId = (id) => document.getElementById(id);

// Only a change, because a screen reader says it; in place, because a new node costs more.
export function setText(element, text) {
  const node = element.firstChild;
  if ((node?.data ?? '') === text) return;
  if (node && text) node.data = text;
  else element.textContent = text;
}

const address = new URL(location.href);  // ?assets=ETH,BTC&range=24h&sort=-price

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
export const linkTo = (assets) => withChoice(new URL(address), 'assets', assets);

export function stateOf(feed, rows, isStale) {
  if (!feed.isServed) return feed.phase === 'paused' ? 'paused' : feed.trouble;
  if (feed.health?.age_seconds === null && !rows.some(({ asset }) => feed.hasSeen(asset))) return 'starting';
  if (feed.polled === -Infinity) return 'connecting';
  return isStale ? 'stale' : 'live';
}

export function showTitle(state, unseen, source, top) {
  const [, mark = source === 'demo' ? 'DEMO ' : ''] = STATES[state];
  const title = unseen + mark + (top?.price ? `${formatPrice(top.price, top.decimals)} ${top.asset}` : 'Prices');
  if (document.title !== title) document.title = title;
}

export function showState(state, health, age, polled) {
  document.body.dataset.state = state;
  setText(byId('state'), STATES[state][0]);
  const since = () => (age < 600 ? '' : `, of ${formatTime(polled, now())}`);
  setText(byId('age'), age < Infinity ? `prices ${formatAge(age)} old${since()}` : '');
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
  const setClass = (name, isSet) => body.classList.toggle(name, isSet);
  const isFew = setClass('few', count <= FEW), isMany = setClass('many', count > MANY);
  setClass('alone', count === 1);
  root.classList.toggle('wall', isWall);
  root.style.removeProperty('--chart');
  const rem = parseFloat(getComputedStyle(root).fontSize);
  setClass('stacked', isFew || innerWidth < STACKED * rem);
  if (root.scrollWidth > root.clientWidth) setClass('stacked', true);
  if (count && !isMany) {
    // A pixel less: browsers round the height of each row, and the page would scroll.
    const free = (innerHeight - Math.ceil(body.getBoundingClientRect().height)) / count - 1;
    root.style.setProperty('--chart', `${Math.floor(rows[0].parts.chart.offsetHeight + Math.max(free, 0))}px`);
  }
}
