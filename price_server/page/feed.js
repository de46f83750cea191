// The connection: WebSocket, else Server-Sent Events, else /prices.

import { ASLEEP, ask, backoff, followServer, hasSlept, now, openConnection, steady } from './server.js';

const TIMEOUT = 20;  // seconds for /healthz, and for the feed to open without it
const OPENING = 5;  // for one way to open, and for its first price
const CHECK = 15;  // between two requests while no prices come
const SOCKET_AGAIN = 300;  // until WebSocket is tried again

export class Feed {
  phase = 'waiting';  // for the next attempt, 'opening', 'open', 'paused'
  trouble = 'connecting';  // or 'lost', 'full', 'blocked'
  failures = 0;
  health = null;
  polled = -Infinity;  // when the prices were, by now()
  assets = [];  // in the order of the address
  only = '';  // the same, for ?assets=; '' for all
  answered = false;  // /healthz has, in this attempt
  #attempt = 0;
  #deadline = Infinity;  // of the phase, by steady()
  #healthAsked = 0;  // Infinity while it is asked
  #connection = null;
  #trial = null;  // a WebSocket beside a stream
  #isRefused = false;  // before /healthz had answered
  #socketAgain = 0;
  #pricesAsked = -Infinity;
  #isPolling = false;

  // on: price(update, { at, isNew: of a poll just made, isGap: the first after a while }), health(isOther), opened(),
  // changed(), slept()
  constructor(wanted, on) { Object.assign(this, { wanted, on }); }

  get query() { return this.only && `?assets=${this.only}`; }
  get isFull() { return this.health.clients >= this.health.max_clients; }
  get hasNothingYet() { return this.answered && this.assets.every((id) => this.health.without_price.includes(id)); }
  get isServed() { return this.phase === 'open' && (this.#connection.seen.size > 0 || this.hasNothingYet); }
  hasSeen(asset) { return Boolean(this.#connection?.seen.has(asset)); }

  // Closes what is open; `seconds` later the phase is over.
  hangUp(phase, seconds = Infinity) {
    this.#connection?.close();
    this.#trial?.close();
    this.#connection = this.#trial = null;
    [this.phase, this.#deadline] = [phase, steady() + seconds];
  }

  // An attempt: /healthz and, where the assets are known, the feed beside it.
  connect() {
    this.hangUp('opening', TIMEOUT);
    this.#attempt += 1;
    this.answered = this.#isRefused = false;
    if (this.health || !this.wanted.length) this.#openFirst();  // else it waits for /healthz
    this.askHealth();
  }

  #openFirst() {
    this.#open(steady() < this.#socketAgain ? 'stream' : 'socket');
  }

  #open(kind) {
    this.#connection?.close();
    this.phase = 'opening';
    this.#connection = this.#openConnection(kind);
    if (this.answered) this.#deadline = steady() + OPENING;
  }

  #openConnection(kind) {
    return openConnection(kind, this.query, {
      opened: (connection) => this.#opened(connection),
      message: (connection, event) => this.#receive(connection, JSON.parse(event.data)),
      closed: (connection) => this.#closed(connection),
    });
  }

  #opened(connection) {
    if (connection === this.#trial) return;
    this.phase = 'open';
    this.#deadline = steady() + OPENING;  // a proxy may hold prices back
    this.on.opened();
  }

  #receive(connection, update) {
    if (!update.asset_id) return;
    if (connection === this.#trial) {  // it brings prices: now the stream may go
      connection.follows = this.#connection;
      this.#connection.close();
      [this.#connection, this.#trial] = [connection, null];
    }
    if (this.phase !== 'paused' && hasSlept()) return this.on.slept();
    const isFirst = !connection.seen.has(update.asset_id);  // it may be old
    const isNew = !isFirst || (this.answered && this.health.age_seconds === null);
    const isGap = isFirst && !connection.follows?.seen.has(update.asset_id);
    connection.seen.add(update.asset_id);
    this.#isPolling = false;
    if (isNew) this.polled = now();
    this.on.price(update, { at: this.polled, isNew, isGap });
  }

  #closed(connection) {
    if (connection === this.#trial) this.#trial = null;
    else if (this.phase === 'opening') this.#fail();
    else this.#lose('lost');
  }

  // This way did not open: after WebSocket the stream, after that none.
  #fail() {
    const { kind } = this.#connection;
    this.#connection.close();
    if (!this.answered && this.#healthAsked === Infinity) this.#isRefused = true;  // /healthz will say why
    else if (!this.answered) this.#lose('lost');
    else if (kind === 'socket' && !this.isFull) {
      this.#socketAgain = steady() + SOCKET_AGAIN;
      this.#open('stream');
    } else {
      this.#socketAgain = 0;
      this.#lose(this.isFull ? 'full' : 'blocked');
    }
  }

  #lose(trouble) {
    // Soon, where prices came before.
    this.failures = this.#connection?.seen.size ? 1 : this.failures + 1;
    this.trouble = trouble;
    this.hangUp('waiting', backoff(this.failures));
    this.on.changed();
  }

  // With each attempt, as a restarted server may differ, and when the feed is silent.
  async askHealth() {
    const attempt = this.#attempt, { answered } = this, asked = Date.now();
    this.#healthAsked = Infinity;
    const answer = await ask('healthz', TIMEOUT);
    if (attempt !== this.#attempt) return;
    this.#healthAsked = steady();
    if (!answer?.assets) {
      if (this.#isRefused || (this.phase === 'open' && answered)) this.#lose('lost');
    } else if (this.#takeHealth(answer, (asked + Date.now()) / 2000)) {
      return this.connect();
    } else {
      this.answered = true;
      if (this.phase === 'opening') this.#continueAttempt();
      // Polled, and nothing came: the connection is dead.
      else if (this.phase === 'open' && answered && this.health.polled - this.polled > ASLEEP) this.connect();
    }
    this.on.changed();
  }

  #continueAttempt() {
    this.#deadline = steady() + OPENING;
    if (this.#isRefused) this.#fail();
    else if (!this.#connection) this.#openFirst();
  }

  tick(isLive) {
    const { phase } = this, isDue = steady() > this.#deadline, isPast = (at, seconds) => steady() - at > seconds;
    if (phase === 'waiting' && isDue) this.connect();
    else if (phase === 'opening' && isDue) this.answered ? this.#fail() : this.#lose('lost');
    else if (phase === 'open' && isDue && this.answered && !this.isServed) this.#fail();
    else if (phase === 'open' && isPast(this.#healthAsked, CHECK) && !(isLive && this.answered)) this.askHealth();
    else if (phase === 'open' && this.#connection.kind === 'stream' && isPast(this.#socketAgain, 0)) this.#trySocket();
    const isShut = phase !== 'open' && (this.trouble === 'full' || this.trouble === 'blocked');
    if (isShut && isPast(this.#pricesAsked, CHECK)) this.#askPrices();
  }

  // Beside the stream, which stays until the socket brings prices.
  #trySocket() {
    this.#socketAgain = steady() + SOCKET_AGAIN;
    this.#trial?.close();
    this.#trial = this.#openConnection('socket');
  }

  // Where neither way opens.
  async #askPrices() {
    this.#pricesAsked = steady();
    const updates = await ask(`prices${this.query}`, TIMEOUT);
    if (this.isServed || !Array.isArray(updates)) return;
    const isGap = !this.#isPolling, isNew = !isGap && this.health.polled > this.polled + 0.05;
    this.#isPolling = true;
    this.polled = Math.max(this.polled, this.health.polled);
    for (const update of updates) this.on.price(update, { at: this.polled, isNew, isGap });
  }

  // Returns whether the source or the quote currency changed.
  #takeHealth(health, at) {
    const previous = this.health, { wanted } = this;
    const isOther = previous && (health.quote !== previous.quote || health.source !== previous.source);
    if (!previous) this.polled += health.time - at;
    if (isOther) this.polled = -Infinity;
    followServer(health.time, at);
    health.polled = health.time - (health.age_seconds ?? Infinity);
    this.health = health;
    this.polled = Math.min(this.polled, now());  // of a clock that was set back
    const known = wanted.filter((asset) => health.assets.includes(asset));
    this.only = known.length < health.assets.length ? known.join() : '';
    this.assets = known.length ? known : health.assets;
    this.on.health(isOther);
    return isOther;
  }
}
