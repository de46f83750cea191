// Numbers and times as a person reads them.

const MINUTE = 60, HOUR = 3600, DAY = 86400;  // seconds
const LAST = 20;
const TIME_STEPS = [1, 2, 5, 10, 15, 30].map((n) => n * MINUTE)
  .concat([1, 2, 3, 6, 12].map((n) => n * HOUR), [1, 2, 5, 7, 14].map((n) => n * DAY));
const PRICE_STEPS = [1, 2, 5, 10, 2.5, 3, 4, 6, 8, 1.5];
const MONTH_STEPS = [1, 2, 3, 6, 12];

const formats = new Map();  // by decimals: it takes long to make one

function withDecimals(number, decimals) {
  const digits = Math.min(decimals, 20);
  if (!formats.has(digits)) {
    const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    formats.set(digits, new Intl.NumberFormat('en-US', options));
  }
  return formats.get(digits).format(number);
}

const magnitude = (price) => Math.floor(Math.log10(price));

// Five digits, but cents always: 177.53, 0.093412. A price that has fewer keeps its own (0.0934), unless it is tiny.
// From a million on no cents.
export function decimalsOf(price) {
  if (price >= 1e6) return 0;
  if (price < 1e-6) return 4 - magnitude(price);
  const [digits, exponent = 0] = price.toExponential(4).split('e');
  const own = digits.replace(/^.\.?|0+$/g, '').length - exponent;
  return Math.max(own, 2);
}

// Those that the last prices of a row need, so that numbers do not jump; but not for one bad tick of 0.0000012.
export function commonDecimals(prices) {
  const last = prices.slice(-LAST);
  if (!last.length) return 0;
  const median = last.slice().sort((one, other) => one - other)[last.length >> 1];
  return Math.min(Math.max(...last.map(decimalsOf)), Math.max(5 - magnitude(median), 2));
}

export function formatPrice(price, decimals = 0) {
  if (price < 1e-12 || price >= 1e15) return price.toExponential(4);
  return withDecimals(price, Math.max(decimals, decimalsOf(price)));
}

export function formatChange(change) {
  const text = withDecimals(Math.abs(100 * change), 2);
  if (text === '0.00') return '0.00%';
  return `${change > 0 ? '+' : '−'}${text}%`;
}

export function formatAge(seconds) {
  const minutes = Math.floor(seconds / MINUTE), rest = `${Math.floor(seconds % MINUTE)} s`;
  if (minutes < 10) return minutes ? `${minutes} min ${rest}` : rest;
  if (minutes < 60) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.floor(minutes / 1440)} days`;
}

// With the date unless it is today's, and the zone: the clocks may have changed since.
export function formatTime(epoch, today, options = { timeZoneName: 'short' }) {
  const date = new Date(epoch * 1000), current = new Date(today * 1000);
  const day = date.toDateString() === current.toDateString() ? {} : { day: 'numeric', month: 'short' };
  if (date.getFullYear() !== current.getFullYear()) day.year = 'numeric';
  return date.toLocaleString('en-GB', { hour: '2-digit', minute: '2-digit', ...day, ...options });
}

// 70000, 70,000.50, 0.093 or 0,093, as people type. NaN for what is no price.
export function parsePrice(text) {
  const bare = text.replace(/[\s_]/g, '');
  if (/^[1-9]\d{0,2}(,\d{3})+(\.\d+)?$/.test(bare)) return positive(bare.replace(/,/g, ''));
  return /^(\d+[.,]?\d*|[.,]\d+)(e-?\d+)?$/i.test(bare) ? positive(bare.replace(',', '.')) : NaN;
}

const positive = (text) => (Number(text) > 0 && Number(text) < Infinity ? Number(text) : NaN);

export function roundedPrice(price, height) {
  const digits = -Math.floor(Math.log10(height / 50));
  return Number(digits > 0 ? price.toFixed(Math.min(digits, 20)) : Math.round(price * 10 ** digits) / 10 ** digits);
}

const multiples = (step, low, high) => {
  const found = [];
  for (let i = Math.ceil(low / step); i <= high / step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
};

export function roundPrices(low, high) {
  const unit = 10 ** Math.floor(Math.log10((high - low) / 3));
  const grids = PRICE_STEPS.map((step) => multiples(step * unit, low, high));
  return grids.find(({ length }) => length === 3 || length === 4) ?? [];
}

export function roundTimes(start, end, most = 4) {
  const step = TIME_STEPS.find((each) => (end - start) / each <= most);
  const date = new Date(start * 1000), found = [];
  if (step < DAY) {
    const ahead = -date.getTimezoneOffset() * MINUTE;
    return multiples(step, start + ahead, end + ahead).map((time) => time - ahead);
  }
  date.setHours(0, 0, 0, 0);
  const months = step ? 0 : MONTH_STEPS.find((each) => (end - start) / (31 * DAY * each) <= most) ?? 12;
  if (months) date.setMonth(Math.floor(date.getMonth() / months) * months, 1);
  for (; date / 1000 <= end; months ? date.setMonth(date.getMonth() + months) : date.setDate(date.getDate() + step / DAY)) {
    if (date / 1000 >= start) found.push(date / 1000);
  }
  return found;
}

export function formatRoundTime(epoch, span) {
  const date = new Date(epoch * 1000);
  if (span > 60 * DAY) return date.toLocaleString('en-GB', { month: 'short', year: date.getMonth() ? undefined : 'numeric' });
  const isMidnight = date.getHours() + date.getMinutes() === 0;
  return date.toLocaleString('en-GB', isMidnight
    ? { day: 'numeric', month: 'short' } : { hour: '2-digit', minute: '2-digit' });
}
