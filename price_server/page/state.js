// The state of the page, as the page and its title say it.

import { now } from './clock.js';
import { byId, setText } from './dom.js';
import { formatAge, formatTime } from './format.js';

const STATES = {  // as the page says it, and how its title begins
  connecting: ['Connecting …'], starting: ['Waiting for the first prices'], live: ['Live'], stale: ['Stale', 'STALE '],
  lost: ['Connection lost, reconnecting', 'LOST '], full: ['The server is full', 'FULL '],
  blocked: ['No live prices', 'NOT LIVE '], paused: ['Paused', 'PAUSED '] };

export function stateOf(feed, rows, isStale) {
  if (!feed.isServed) return feed.phase === 'paused' ? 'paused' : feed.trouble;
  if (feed.health?.age_seconds === null && !rows.some(({ asset }) => feed.hasSeen(asset))) return 'starting';
  if (feed.polled === -Infinity) return 'connecting';
  return isStale ? 'stale' : 'live';
}

// `top`: the first row, whose price the title tells.
export function titleOf(state, unseen, isDemo, top) {
  const [, mark = isDemo ? 'DEMO ' : ''] = STATES[state];
  return unseen + mark + (top?.price ? `${top.parts.price.textContent} ${top.asset}` : 'Prices');
}

// `age` and `polled`: of the prices.
export function showState(state, health, age, polled) {
  document.body.dataset.state = state;
  setText(byId('state'), STATES[state][0]);
  const since = age < 600 ? '' : `, of ${formatTime(polled, now())}`;
  setText(byId('age'), age < Infinity ? `prices ${formatAge(age)} old${since}` : '');
  setText(byId('error'), health?.last_error ? `Last error: ${health.last_error}` : '');
}
