// The state of the view, which the address of the page holds: ?assets=ETH,BTC&range=24h&sort=-price

const address = new URL(location.href);

// In this order; each once.
export const wanted = [...new Set(
  address.searchParams.getAll('assets').join().toUpperCase().split(/[\s,]+/).filter(Boolean))];

export const get = (name) => address.searchParams.get(name) ?? '';

const write = (url) => url.href.replace(/%2C/g, ',');

// Without an entry in the browser's history: "back" leaves the page. An empty value leaves it out.
export function set(name, value) {
  if (value) address.searchParams.set(name, value);
  else address.searchParams.delete(name);
  history.replaceState(null, '', write(address));
}

// This view with other assets: those in `assets`, joined by commas, or all for ''.
export function linkTo(assets) {
  const url = new URL(address.href);
  url.searchParams.delete('assets');
  if (assets) url.searchParams.set('assets', assets);
  return `?${write(url).split('?')[1] ?? ''}`;
}
