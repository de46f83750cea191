// Numbers and times as a person reads them.

const MINUTE = 60, DAY = 86400;  // seconds
const TIME_STEPS = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, DAY, 2 * DAY, 5 * DAY, 7 * DAY, 14 * DAY];
const PRICE_STEPS = [1, 2, 5, 10, 2.5, 3, 4, 6, 8, 1.5];
const MONTH_STEPS = [1, 2, 3, 6, 12];
const MOST = 5;  // times

const formats = new Map();  // it takes long to make one

function intl(Kind, locale, options, zone) {
  const key = JSON.stringify(options) + zone;
  if (!formats.has(key)) formats.set(key, new Kind(locale, options));
  return formats.get(key);
}

// By the offset too: users travel.
const formatDate = (date, options) => intl(Intl.DateTimeFormat, 'en-GB', options, date.getTimezoneOffset()).format(date);

function withDecimals(number, decimals) {
  const digits = Math.min(decimals, 20);
  return intl(Intl.NumberFormat, 'en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(number);
}

const magnitude = (price) => Math.floor(Math.log10(price));

// Five digits, and at least cents below a million; fewer where a price has fewer, unless it is tiny.
export function decimalsOf(price) {
  if (price >= 1e6) return 0;
  if (price < 1e-6) return 4 - magnitude(price);
  const [digits, exponent = 0] = price.toExponential(4).split('e');
  const own = digits.replace(/^.\.?|0+$/g, '').length - exponent;
  return Math.max(own, 2);
}

// As the last prices need, so that digits do not jump; but not for one bad tick.
export function commonDecimals(prices) {
  if (!prices.length) return 0;
  const median = prices.slice().sort((one, other) => one - other)[prices.length >> 1];
  return Math.min(Math.max(...prices.map(decimalsOf)), Math.max(5 - magnitude(median), 2));
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

// With the date unless it is today's, and the zone, as clocks change.
export function formatTime(epoch, today, options = { timeZoneName: 'short' }) {
  const date = new Date(epoch * 1000), current = new Date(today * 1000);
  const day = date.toDateString() === current.toDateString() ? {} : { day: 'numeric', month: 'short' };
  if (date.getFullYear() !== current.getFullYear()) day.year = 'numeric';
  return formatDate(date, { hour: '2-digit', minute: '2-digit', ...day, ...options });
}

// 70000, 70,000.50, 0.093 or 0,093, as people type; or NaN.
export function parsePrice(text) {
  const typed = text.replace(/[\s_]/g, '');
  const bare = /^[1-9]\d{0,2}(,\d{3})+(\.\d+)?$/.test(typed) ? typed.replace(/,/g, '') : typed.replace(',', '.');
  const price = /^(\d+\.?\d*|\.\d+)(e-?\d+)?$/i.test(bare) ? Number(bare) : NaN;
  return price > 0 && price < Infinity ? price : NaN;
}

export function roundedPrice(price, height) {
  return Number(price.toPrecision(Math.max(magnitude(Math.abs(price)) - magnitude(height / 50) + 1, 1)));
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

export function roundTimes(start, end) {
  const step = TIME_STEPS.find((each) => (end - start) / each <= MOST);
  const date = new Date(start * 1000), found = [];
  if (step < DAY) {
    const ahead = -date.getTimezoneOffset() * MINUTE;
    return multiples(step, start + ahead, end + ahead).map((time) => time - ahead);
  }
  date.setHours(0, 0, 0, 0);
  const months = step ? 0 : MONTH_STEPS.find((each) => (end - start) / (31 * DAY * each) <= MOST) ?? 12;
  if (months) date.setMonth(Math.floor(date.getMonth() / months) * months, 1);
  for (; date / 1000 <= end; months ? date.setMonth(date.getMonth() + months) : date.setDate(date.getDate() + step / DAY)) {
    if (date / 1000 >= start) found.push(date / 1000);
  }
  return found;
}

export function formatRoundTime(epoch, span) {
  const date = new Date(epoch * 1000);
  if (span > 60 * DAY) return formatDate(date, { month: 'short', year: date.getMonth() ? undefined : 'numeric' });
  const isMidnight = date.getHours() + date.getMinutes() === 0;
  return formatDate(date, isMidnight ? { day: 'numeric', month: 'short' } : { hour: '2-digit', minute: '2-digit' });
}
