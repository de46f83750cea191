import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  commonDecimals, decimalsOf, formatAge, formatChange, formatPrice, formatRoundTime, formatTime, parsePrice, roundedPrice,
  roundPrices, roundTimes,
} from '../../price_server/page/format.js';

const HOUR = 3600, DAY = 24 * HOUR;
const utc = (text) => Date.parse(`${text}Z`) / 1000;

test('a price keeps the digits that matter', () => {
  const shown = {
    45000: '45,000.00', 0.0934: '0.0934', 0.00001234: '0.00001234', 177.534123456789: '177.53', 0.093412345: '0.093412',
    9.99999: '10.00', 25000000000000.4: '25,000,000,000,000', 1e300: '1.0000e+300', 9.21e-7: '0.00000092100',
    1e-9: '0.0000000010000', 1.2345678e-12: '0.0000000000012346', 1e-13: '1.0000e-13', 0.1: '0.10' };
  for (const [price, text] of Object.entries(shown)) assert.equal(formatPrice(Number(price)), text);
});

test('decimals follow the last prices, not one bad tick and not a limit that is crossed to and fro', () => {
  const shown = (prices) => formatPrice(prices[prices.length - 1], commonDecimals(prices));
  assert.equal(shown([65980.1, 65981.3, 0.0000012]), '0.0000012');
  assert.equal(shown([65980.1, 0.0000012, 65981.2]), '65,981.20');
  assert.equal(shown([...Array(19).fill(65981.2), 0.0000012, 65981.2]), '65,981.20');
  assert.equal(shown([999999.12, 1000001.4]), '1,000,001.40');
  assert.equal(shown(Array(20).fill(1000001.4)), '1,000,001');
  assert.equal(shown([9.9912, 10.012]), '10.0120');
  assert.equal(shown([9.21e-7, 1.0023e-6]), '0.00000100230');
  assert.deepEqual([commonDecimals([]), decimalsOf(1.5)], [0, 2]);
});

test('a change has a sign, and none when it is nothing', () => {
  assert.deepEqual([0.0261, -0.05, 0, -0.00001, 12].map(formatChange),
    ['+2.61%', '−5.00%', '0.00%', '0.00%', '+1,200.00%']);
});

test('an age is as exact as it is short', () => {
  assert.deepEqual([0.4, 59.9, 61, 599, 600, 3599, 7260, 86399, 6 * DAY].map(formatAge),
    ['0 s', '59 s', '1 min 1 s', '9 min 59 s', '10 min', '59 min', '2 h 1 min', '23 h 59 min', '6 days']);
});

test('a time names its zone, and its day unless that is today', () => {
  const now = utc('2026-10-25T03:00:00');  // two hours after the clocks went back
  assert.match(formatTime(utc('2026-10-25T00:30:00'), now), /^02:30 (CEST|GMT\+2)$/);
  assert.match(formatTime(utc('2026-10-25T01:30:00'), now), /^02:30 (CET|GMT\+1)$/);
  assert.match(formatTime(utc('2026-10-20T10:00:00'), now, {}), /^20 Oct, 12:00$/);
  assert.match(formatTime(utc('2025-10-20T10:00:00'), now, {}), /^20 Oct 2025, 12:00$/);
  process.env.TZ = 'Asia/Tokyo';  // the visitor travels
  assert.match(formatTime(utc('2026-10-25T00:30:00'), now), /^09:30 (JST|GMT\+9)$/);
  process.env.TZ = 'Europe/Berlin';
});

test('what a person types is read as a price or not at all', () => {
  assert.deepEqual(['70000', ' 70,000.50 ', '1,234,567', '0.093', '0,093', '.5', '1e-7', '70 000'].map(parsePrice),
    [70000, 70000.5, 1234567, 0.093, 0.093, 0.5, 1e-7, 70000]);
  for (const text of ['', '0', '-1', 'abc', '1,2,3', '1e999', '7.0.0', '٣']) assert.ok(Number.isNaN(parsePrice(text)), text);
});

test('the pointer sets a price as round as it can tell', () => {
  assert.equal(roundedPrice(66123.4567, 2000), 66120);
  assert.equal(roundedPrice(0.0934123, 0.004), 0.09341);
});

test('the grid has three or four round prices', () => {
  for (const [low, high] of [[64273, 66700], [99, 101], [0.0931, 0.0987], [1e-7, 9e-7], [0, 1], [3, 8], [100, 114]]) {
    const prices = roundPrices(low, high);
    assert.ok(prices.length === 3 || prices.length === 4, `${low} ${high} ${prices}`);
    assert.ok(prices.every((price) => price >= low && price <= high && String(Number(price.toPrecision(3))) === String(price)));
  }
  assert.deepEqual(roundPrices(98, 104), [98, 100, 102, 104]);
});

test('the grid has round times by the clock of the visitor', () => {
  const shown = (span, end = utc('2026-11-26T09:10:00')) => (
    roundTimes(end - span, end).map((time) => formatRoundTime(time, span)));
  assert.deepEqual(shown(HOUR), ['09:15', '09:30', '09:45', '10:00']);  // Berlin
  assert.deepEqual(shown(DAY), ['12:00', '18:00', '26 Nov', '06:00']);
  assert.deepEqual(shown(7 * DAY), ['21 Nov', '23 Nov', '25 Nov']);
  assert.deepEqual(shown(7 * DAY, utc('2026-10-28T09:10:00')), ['23 Oct', '25 Oct', '27 Oct']);  // summer time ended
  assert.deepEqual(shown(365 * DAY), ['Jan 2026', 'Apr', 'Jul', 'Oct']);
});
