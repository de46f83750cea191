// Two clocks: now() is the server's time, whatever the visitor's clock says; steady() is for deadlines, and may stand
// still while the computer sleeps. Both in seconds.

export const ASLEEP = 5;  // seconds that the two run apart when the computer slept
const LONGEST_TURN = 90;  // seconds between two calls: a browser runs a hidden page once a minute

const wall = () => Date.now() / 1000;
export const steady = () => performance.now() / 1000;

let skew = 0;  // from the visitor's clock to the server's
let last = { wall: wall(), steady: steady() };

export const now = () => wall() + skew;

// `time` is what the server's clock said when the visitor's said `at`.
export function followServer(time, at) {
  skew = time - at;
}

// Whether the computer slept since the last call: one clock stood still, or both have a long second.
export function hasSlept() {
  const passed = { wall: wall() - last.wall, steady: steady() - last.steady };
  last = { wall: wall(), steady: steady() };
  return Math.abs(passed.wall - passed.steady) > ASLEEP || passed.steady > LONGEST_TURN;
}
