// How the rows use the window: in one line or two, how high the charts are, and large on a wall.

import { byId } from './dom.js';

const FEW = 3, MANY = 15;  // rows: up to FEW are shown large, and above MANY there is a filter
const WALL = { width: 1600, height: 900, rows: 12 };  // a window so large, with at most so many rows, is read from afar
const STACKED = 40, TIGHT = 17;  // rem: below, the chart stands under its row; below, the change under the price
const LOWEST = { row: 2.6, wall: 2.1, stacked: 3.2 }, HIGHEST = { row: 34, wall: 34, stacked: 40 };  // rem, of a chart
const MEASURED = 40;  // rows: with more the charts cannot grow, and measuring takes long

let pending = 0;

// Once a frame, however often it is asked for: each time is a layout of all rows.
export function fitSoon(rows) {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => fit(rows()));
}

function fit(rows) {
  const { body, documentElement: root } = document, count = rows.length;
  const isWall = innerWidth >= WALL.width && innerHeight >= WALL.height && count <= WALL.rows;
  root.classList.toggle('wall', isWall);
  const rem = parseFloat(getComputedStyle(root).fontSize);
  body.classList.toggle('few', count <= FEW);
  body.classList.toggle('alone', count === 1);
  body.classList.remove('stacked', 'tight');
  setChartHeight(LOWEST.wall * rem);
  const isStacked = count <= FEW || body.clientWidth < STACKED * rem || root.scrollWidth > root.clientWidth;
  const kind = isStacked ? 'stacked' : isWall ? 'wall' : 'row', lowest = LOWEST[kind] * rem;
  body.classList.toggle('stacked', isStacked);
  body.classList.toggle('tight', body.clientWidth < TIGHT * rem);
  setChartHeight(lowest);
  if (count && count <= MEASURED) {
    // A pixel less: browsers round the height of each row, and the page would scroll.
    const free = (innerHeight - Math.ceil(body.getBoundingClientRect().height)) / count - 1;
    setChartHeight(Math.min(Math.max(lowest + free, lowest), HIGHEST[kind] * rem));
  }
  keepInSight(root, rem);
}

function setChartHeight(pixels) {
  document.documentElement.style.setProperty('--chart', `${Math.floor(pixels)}px`);
}

// What has the focus must not end up behind the header. In a narrow window only the state stays, not the heading.
function keepInSight(root, rem) {
  const header = byId('header'), above = Math.max(byId('status').offsetTop - header.offsetTop - 0.3 * rem, 0);
  const hidden = above > 1.2 * rem ? Math.floor(above) : 0;
  header.style.top = `${-hidden}px`;
  root.style.scrollPaddingTop = `${header.offsetHeight - hidden + 2 * rem}px`;
}

export function showFilter(count) {
  byId('search').hidden = count <= MANY;
}
