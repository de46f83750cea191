// The page: prices from the feed into rows, the state, and what happens when somebody does something.

import * as address from './address.js';
import { Bells } from './bells.js';
import { Charts } from './chart.js';
import { hasSlept, now, steady } from './clock.js';
import { byId, setText } from './dom.js';
import { Feed } from './feed.js';
import { formatAge } from './format.js';
import { addPoint, chooseRange, Past, takePast } from './history.js';
import { fitSoon, showFilter } from './layout.js';
import { socketAddress } from './line.js';
import { setReading, startReading } from './reading.js';
import { showState, stateOf, titleOf } from './state.js';
import { Table } from './table.js';

const HIDDEN = 600;  // seconds that a hidden page keeps a server polling that would rather pause
const DRAW = 5;  // seconds between two drawings of the charts

const feed = new Feed(address.wanted, {
  price: receive, health: takeHealth, changed: refresh, slept: startAgain,
  opened: () => { past.askSoon(); refresh(); } });
const table = new Table({
  arranged: () => { showFilter(table.rows.length); charts.watch(table.rows); fitSoon(() => table.shown); },
  shown: showTitle,
  tint: () => feed.health?.interval_seconds ?? Infinity });
const past = new Past(), charts = new Charts(() => refresh(true)), bells = new Bells(table);
let state = 'connecting', drawn = -Infinity, hiddenSince = document.hidden ? steady() : Infinity;  // by steady()

const age = () => Math.max(now() - feed.polled, 0);
const staleAfter = () => feed.health?.stale_after_seconds ?? Infinity;

function receive({ asset_id: asset, price, time }, { at, isNew, isGap }) {
  if (!feed.health && !table.find(asset)) unknown.add(asset);
  if (unknown.size && !feed.health) arrangeUnknown();
  const row = table.find(asset);
  if (!row) return;
  row.time = Date.parse(time.replace(/\.\d+/, '')) / 1000 || 0;
  if (isGap) row.isAway = row.isUnchecked = true;
  if (isNew) {
    if (past.range) addPoint(row.points, [at, price], past.range);
    bells.check(row, price, row.isAway || at - row.at > staleAfter());
    Object.assign(row, { at, isAway: false, isUnchecked: false });
  }
  table.change(row, price, isNew);
  if (state !== 'live' || past.isDue || bells.unseen) refresh();
}

// The feed may be faster than /healthz: its assets are shown then, all of one snapshot at once.
const unknown = new Set();
function arrangeUnknown() {
  table.arrange([...table.rows.map((row) => row.asset), ...unknown]);
  unknown.clear();
}

function takeHealth(isOther) {
  const { health, assets, only } = feed;
  if (isOther) {
    table.clear();
    past.forget();
  }
  if (assets.join() !== table.rows.map((row) => row.asset).join()) table.arrange(assets);
  bells.take(health);
  const missing = address.wanted.filter((asset) => !health.assets.includes(asset));
  setText(byId('in'), ` in ${health.quote}`);
  setText(byId('unknown'), missing.length ? `Not tracked here: ${missing.join(', ')}.` : '');
  byId('all').hidden = !only;
  document.body.dataset.source = health.source;
  if (!past.chosen) showRange(chooseRange(health, address.get('range'), now()));
}

function showRange(range) {
  const { ranges } = feed.health, { children } = byId('ranges'), query = feed.only && `&assets=${feed.only}`;
  past.choose(range);
  while (children.length < ranges.length) byId('ranges').append(document.createElement('button'));
  ranges.forEach((each, i) => {
    setText(children[i], each.name);
    children[i].setAttribute('aria-pressed', String(each.name === range.name));
  });
  byId('history').href = `history?range=${range.name}${query}`;
  byId('csv').href = `history?range=${range.name}${query}&format=csv`;
  byId('csv').hidden = false;
  table.link();
  setReading({ quote: feed.health.quote, hasSeconds: range.step < 60 });
}

async function loadPast() {
  if (!past.isDue || (!feed.isServed && feed.phase !== 'waiting')) return;  // prices first
  const answer = await past.load(feed.only && `&assets=${feed.only}`);
  if (!answer) return;
  takePast(table.rows, answer);
  for (const row of table.rows) {
    const last = row.points[row.points.length - 1];
    if (last) table.change(row, (feed.hasSeen(row.asset) && row.price) || last[1], false);
    // Without a feed, or before the server's first poll, what was recorded last is all there is.
    if (last && (!feed.isServed || feed.health.age_seconds === null)) feed.polled = Math.max(feed.polled, last[0]);
  }
  refresh(true);
  fitSoon(() => table.shown);
}

/* The state, once a second and when something happened */

function refresh(drawNow = false) {
  const { health } = feed;
  // The prices that a connection begins with are as old as /healthz says.
  if (feed.isServed && feed.answered) feed.polled = Math.max(feed.polled, health.polled);
  loadPast();
  state = stateOf(feed, table.rows, age() > staleAfter());
  byId('rows').setAttribute('aria-busy', String(past.range?.name !== past.chosen?.name));
  showState(state, health, age(), feed.polled);
  if (state === 'live' && feed.answered) checkAlerts();
  if (document.hidden) table.flush();
  showTitle();
  const isDue = drawNow || steady() - drawn >= DRAW;
  if (isDue && health && past.range && !document.hidden && age() < Infinity) draw();
}

function showTitle() {
  document.title = titleOf(state, bells.unseen, feed.health?.source === 'demo', table.rows[0]);
}

function draw() {
  drawn = steady();
  const off = table.mark(state === 'live', feed.polled, (asset) => feed.hasSeen(asset));
  setText(byId('clocks'), off ? `The clocks of this server and of CoinAPI differ by about ${formatAge(off)}.` : '');
  charts.draw({
    rows: table.rows, range: past.range, polled: feed.polled, stale: staleAfter(), interval: feed.health.interval_seconds,
    drawn: () => {
      for (const row of table.rows) if (row.price !== null) table.change(row, row.price, false);
      table.sortUnlessUsed();
    } });
}

// The prices that a connection began with, now that they are known to be current.
function checkAlerts() {
  for (const row of table.rows) {
    if (!row.isUnchecked) continue;
    bells.check(row, row.price, true);
    Object.assign(row, { at: feed.polled, isAway: false, isUnchecked: false });
  }
}

function startAgain() {
  feed.trouble = 'connecting';
  past.askSoon();
  feed.connect();
  refresh(true);
}

function tick() {
  if (feed.phase === 'paused') return;
  if (hasSlept()) return startAgain();
  const isUnseen = steady() - hiddenSince > HIDDEN;
  if (isUnseen && feed.health?.pause_when_idle && !bells.isAnySet) feed.hangUp('paused');
  else feed.tick(state === 'live');
  refresh();
}

function wake() {
  hiddenSince = document.hidden ? Math.min(hiddenSince, steady()) : Infinity;
  if (document.hidden) return;
  bells.seen();
  tick();
  if (feed.phase === 'open') feed.askHealth();
  else if (feed.phase !== 'opening') feed.connect();
  table.flush();
  refresh(true);
}

/* What somebody does */

function click({ target }) {
  const head = target.closest('[data-sort]');
  if (head && target.matches('button')) table.sortBy(head.dataset.sort);
  if (!target.matches('#ranges button')) return;
  address.set('range', target.textContent);
  showRange(chooseRange(feed.health, target.textContent, now()));
  refresh();
}

function start() {
  byId('loading').remove();
  setText(byId('feed'), socketAddress(document.baseURI));
  document.addEventListener('click', click);
  byId('filter').addEventListener('input', ({ target }) => table.filter(target.value));
  startReading(table, byId('rows'));
  for (const type of ['online', 'offline', 'visibilitychange']) addEventListener(type, wake);
  // Back and forward: a browser may hold the page as it was, but not with an open connection.
  addEventListener('pagehide', () => feed.hangUp('waiting'));
  addEventListener('pageshow', ({ persisted }) => { if (persisted) startAgain(); });
  addEventListener('resize', () => fitSoon(() => table.shown));
  new ResizeObserver(() => fitSoon(() => table.shown)).observe(byId('size'));
  feed.connect();
  setInterval(tick, 1000);
}

start();
