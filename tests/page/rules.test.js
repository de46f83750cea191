// The rules of the feed, the past, the alerts and the table, as far as they are pure.
import assert from 'node:assert/strict';
import { test } from 'node:test';

globalThis.location = { href: 'http://127.0.0.1:3030/' };
globalThis.document = { getElementById: () => null };
const page = '../../price_server/page';
const { newAlert, watch } = await import(`${page}/alerts.js`);
const { addPoint, chooseRange, mergePoints, prune } = await import(`${page}/history.js`);
const { backoff, socketAddress } = await import(`${page}/server.js`);
const { compareRows, findWrongTimes } = await import(`${page}/table.js`);
const { priceAt, xOf, yOf } = await import(`${page}/chart.js`);

const HOUR = { name: '1h', seconds: 3600, step: 10 }, DAY = { name: '24h', seconds: 86400, step: 300 };

test('attempts come ever later, up to ten seconds, and never all in one moment', () => {
  assert.deepEqual([1, 2, 3, 4, 5, 6, 60].map((failures) => backoff(failures, 1)), [0.5, 1, 2, 4, 8, 10, 10]);
  assert.deepEqual([backoff(6, 0), backoff(6, 0.5)], [5, 7.5]);
  assert.ok(new Set(Array.from({ length: 20 }, () => backoff(3))).size > 10);
});

test('the feed is beside the page', () => {
  assert.equal(socketAddress('https://prices.example/'), 'wss://prices.example/ws');
  assert.equal(socketAddress('https://example.org/prices/?theme=x#top'), 'wss://example.org/prices/ws');
  assert.equal(socketAddress('http://[::1]:8080/a/index.html'), 'ws://[::1]:8080/a/ws');
});

test('a step has one point, the last, and what is older than the range goes', () => {
  const points = [];
  for (const time of [100, 103, 109, 110, 3705, 3708]) addPoint(points, [time, time], HOUR);
  assert.deepEqual(points, [[109, 109], [110, 110], [3708, 3708]]);
  for (let time = 0; time < 7 * 86400; time += 5) addPoint(points, [4000 + time, 1], HOUR);
  assert.equal(points.length, 360);
  prune(points, 1e9);
  assert.deepEqual(points, []);
});

test('the points of a restarted server join those of the page', () => {
  const own = [[10, 1], [20, 1], [30, 1], [90, 1]];
  assert.deepEqual(mergePoints(own, [[20, 2], [25, 2]], 50), [[10, 1], [20, 2], [25, 2], [30, 1]]);
  assert.deepEqual(mergePoints(own, [], 50), own);
});

test('a day is shown as soon as there is more than an hour of past', () => {
  const choose = (since, interval = 5, name = '') => chooseRange(
    { ranges: [{ ...HOUR, since }, { ...DAY, since }], interval_seconds: interval }, name, 10000).name;
  assert.deepEqual([choose(null), choose(7000), choose(6000), choose(null, 3600), choose(6000, 5, '1h')],
    ['1h', '1h', '24h', '24h', '1h']);
});

test('an alert fires once for each crossing, and again only after the price was away from the line', () => {
  let alert = newAlert(100, 101);
  const fired = [];
  for (const price of [100.5, 100, 99.95, 100.05, 99.95, 99.8, 100.05, 102, 98]) {
    const seen = watch(alert, price);
    if (seen.crossed) fired.push(price);
    alert = seen.alert;
  }
  assert.deepEqual(fired, [99.95, 100.05, 98]);
  const first = watch(newAlert(100, null), 101);
  assert.deepEqual([first.crossed, first.alert.side, watch(first.alert, 99).crossed], [false, 1, true]);
});

test('the time of an asset is measured by the poll, and never by another asset', () => {
  const at = 1e6, { notes, clocks } = findWrongTimes([at - 30, at + 86400, at - 780, 0], at);
  assert.deepEqual([notes, clocks], [['', '24 h 0 min ahead', '13 min behind', ''], 0]);
  const all = findWrongTimes([at - 7200, at - 7230, at - 7190], at);
  assert.deepEqual([all.notes, Math.round(all.clocks / 60)], [['', '', ''], 120]);
  assert.deepEqual(findWrongTimes([at - 7200], at).notes, ['2 h 0 min behind']);
});

test('rows without a value are last, whichever way', () => {
  const rows = [null, 2, null, 3, 1].map((change) => ({ change }));
  const sorted = (way) => rows.slice().sort(compareRows('change', way)).map(({ change }) => change);
  assert.deepEqual([sorted(1), sorted(-1)], [[1, 2, 3, null, null], [3, 2, 1, null, null]]);
});

test('a height in a chart is a price and back', () => {
  const row = { start: 0, end: 200, top: 110, height: 20 };
  assert.deepEqual([xOf(row, 50), yOf(row, 110), yOf(row, 90)], ['250.0', '4.0', '96.0']);
  assert.equal(Math.round(priceAt(row, Number(yOf(row, 97)) / 100)), 97);
});
