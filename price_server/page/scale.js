// Where a time and a price are in the chart of a row (x to 1000, y to 100), and which price is at a height.

export const xOf = (row, time) => ((1000 * (time - row.start)) / (row.end - row.start)).toFixed(1);
export const yOf = (row, price) => (4 + (92 * (row.top - price)) / row.height).toFixed(1);
export const priceAt = (row, share) => row.top - ((100 * share - 4) * row.height) / 92;
