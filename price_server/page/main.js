// The page: prices from the feed into rows, the state, and what somebody does.

import { Alerts } from './alerts.js';
import { drawCharts, startReading } from './chart.js';
import { Feed } from './feed.js';
import { formatAge } from './format.js';
import { addPoint, chooseRange, mergePoints, PriceHistory } from './history.js';
import {
  byId, fitSoon, getChoice, setChoice, setText, showState, showTitle, stateOf, wanted } from './layout.js';
import { hasSlept, now, socketAddress, steady } from './server.js';
import { Table } from './table.js';

const HIDDEN = 600;  // seconds until a hidden page lets a server pause
const DRAW = 5;  // seconds between two drawings of the charts

const feed = new Feed(wanted, {
  price: receive, health: takeHealth, changed: refresh, slept: startAgain,
  opened: () => { priceHistory.askSoon(); refresh(); } });
const table = new Table({
  arranged: fit,
  shown: tell,
  interval: () => feed.health?.interval_seconds ?? Infinity });
const priceHistory = new PriceHistory(), alerts = new Alerts(table);
const early = [];
let state = 'connecting', drawn = -Infinity, hiddenSince = document.hidden ? steady() : Infinity;

const age = () => Math.max(now() - feed.polled, 0);
const staleAfter = () => feed.health?.stale_after_seconds ?? Infinity;

function receive(update, how) {
  const row = table.find(update.asset_id);
  if (row) take(row, update, how);
  else if (!feed.health && early.push([update, how]) === 1) setTimeout(takeEarly, 20);  // a snapshot at once
}

function takeEarly() {
  const assets = early.map(([update]) => update.asset_id);
  if (!feed.health) table.arrange([...new Set([...table.rows.map((row) => row.asset), ...assets])]);
  for (const [update, how] of early.splice(0)) receive(update, how);
}

function take(row, { price, time }, { at, isNew, isGap }) {
  row.time = Date.parse(time.replace(/\.\d+/, '')) / 1000 || 0;
  if (isGap) row.isAway = true;
  if (isNew) {
    if (priceHistory.range) addPoint(row.points, [at, price], priceHistory.range);
    alerts.check(row, price, row.isAway || at - row.at > staleAfter());
    Object.assign(row, { at, isAway: false });
  }
  table.change(row, price, isNew);
  if (state !== 'live' || priceHistory.isDue || alerts.unseen) refresh();
}

function takeHealth(isOther) {
  const { health, assets, only } = feed;
  if (isOther) {
    table.arrange([]);
    priceHistory.forget();
  }
  if (assets.join() !== table.rows.map((row) => row.asset).join()) table.arrange(assets);
  takeEarly();
  alerts.take(health);
  const missing = wanted.filter((asset) => !health.assets.includes(asset));
  setText(byId('in'), ` in ${health.quote}`);
  setText(byId('unknown'), missing.length ? `Not tracked here: ${missing.join(', ')}.` : '');
  byId('all').hidden = !only;
  document.body.dataset.source = health.source;
  if (!priceHistory.chosen) showRange(chooseRange(health, getChoice('range'), now()));
}

function showRange(range) {
  const { ranges } = feed.health, { children } = byId('ranges'), query = feed.only && `&assets=${feed.only}`;
  priceHistory.choose(range);
  while (children.length < ranges.length) byId('ranges').append(document.createElement('button'));
  ranges.forEach((each, i) => {
    setText(children[i], each.name);
    children[i].setAttribute('aria-pressed', String(each.name === range.name));
  });
  byId('history').href = `history?range=${range.name}${query}`;
  byId('csv').href = `history?range=${range.name}${query}&format=csv`;
  byId('csv').hidden = false;
  table.link();
}

async function loadHistory() {
  if (!priceHistory.isDue || (!feed.isServed && feed.phase !== 'waiting')) return;
  const answer = await priceHistory.load(feed.only && `&assets=${feed.only}`);
  if (!answer) return;
  for (const row of table.rows) {
    row.points = mergePoints(row.points, answer[row.asset] ?? [], now());
    const last = row.points.at(-1);
    if (last) table.change(row, (feed.hasSeen(row.asset) && row.price) || last[1], false);
    if (last && (!feed.isServed || feed.health.age_seconds === null)) feed.polled = Math.max(feed.polled, last[0]);
  }
  refresh(true);
  fit();
}

function refresh(drawNow = false) {
  const { health } = feed;
  // The first prices are as old as /healthz says.
  if (feed.isServed && feed.answered) feed.polled = Math.max(feed.polled, health.polled);
  loadHistory();
  state = stateOf(feed, table.rows, age() > staleAfter());
  byId('rows').setAttribute('aria-busy', String(priceHistory.range?.name !== priceHistory.chosen?.name));
  showState(state, health, age(), feed.polled);
  if (state === 'live' && feed.answered) checkAlerts();
  tell();
  const isDue = drawNow || steady() - drawn >= DRAW;
  if (isDue && health && priceHistory.range && !document.hidden && age() < Infinity) draw();
}

function fit() {
  fitSoon(() => table.shown);
}

function tell() {
  showTitle(state, alerts.unseen, feed.health?.source, table.rows[0]);
}

function draw() {
  drawn = steady();
  const off = table.mark(state === 'live', feed.polled, (asset) => feed.hasSeen(asset));
  setText(byId('clocks'), off ? `The clocks of this server and of CoinAPI differ by about ${formatAge(off)}.` : '');
  drawCharts(table, {
    range: priceHistory.range, polled: feed.polled, stale: staleAfter(),
    interval: feed.health.interval_seconds, quote: feed.health.quote });
}

// The first prices of a connection, now known to be current.
function checkAlerts() {
  for (const row of table.rows) {
    if (!row.isAway || !feed.hasSeen(row.asset)) continue;
    alerts.check(row, row.price, true);
    Object.assign(row, { at: feed.polled, isAway: false });
  }
}

function startAgain() {
  feed.trouble = 'connecting';
  priceHistory.askSoon();
  feed.connect();
  refresh(true);
}

function tick() {
  if (feed.phase === 'paused') return;
  if (hasSlept()) return startAgain();
  const isUnseen = steady() - hiddenSince > HIDDEN;
  if (isUnseen && feed.health?.pause_when_idle && !table.hasAlert) feed.hangUp('paused');
  else feed.tick(state === 'live');
  refresh();
}

function wake() {
  hiddenSince = document.hidden ? Math.min(hiddenSince, steady()) : Infinity;
  if (document.hidden) return;
  alerts.unseen = '';
  tick();
  if (feed.phase === 'open') feed.askHealth();
  else if (feed.phase !== 'opening') feed.connect();
  refresh(true);
}

function click({ target }) {
  const head = target.closest('[data-sort]');
  if (head && target.matches('button')) table.sortBy(head.dataset.sort);
  if (!target.matches('#ranges button')) return;
  setChoice('range', target.textContent);
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
  // Back and forward restore the page, but not its connection.
  addEventListener('pagehide', () => feed.hangUp('waiting'));
  addEventListener('pageshow', ({ persisted }) => { if (persisted) startAgain(); });
  addEventListener('resize', fit);
  const observer = new ResizeObserver(fit);
  for (const id of ['size', 'reason', 'news']) observer.observe(byId(id));
  feed.connect();
  setInterval(tick, 1000);
}

start();
