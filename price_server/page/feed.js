// The connection: WebSocket, else Server-Sent Events, else /prices.

import { ASLEEP, ask, backoff, followServer, hasSlept, now, openLine, steady } from './server.js';

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
  #line = null;
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
  get isServed() { return this.phase === 'open' && (this.#line.seen.size > 0 || this.hasNothingYet); }
  hasSeen(asset) { return Boolean(this.#line?.seen.has(asset)); }

  hangUp(phase, seconds = Infinity) {
    this.#line?.close();
    this.#trial?.close();
    this.#line = this.#trial = null;
    [this.phase, this.#deadline] = [phase, steady() + seconds];
  }

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
    this.#line?.close();
    this.phase = 'opening';
    this.#line = this.#openLine(kind);
    if (this.answered) this.#deadline = steady() + OPENING;
  }

  #openLine(kind) {
    return openLine(kind, this.query, {
      opened: (line) => this.#opened(line),
      message: (line, event) => this.#receive(line, JSON.parse(event.data)),
      closed: (line) => this.#closed(line),
    });
  }

  #opened(line) {
    if (line === this.#trial) return;
    this.phase = 'open';
    this.#deadline = steady() + OPENING;  // a proxy may hold prices back
    this.on.opened();
  }

  #receive(line, update) {
    if (!update.asset_id) return;
    if (line === this.#trial) {  // it brings prices: now the stream may go
      line.follows = this.#line;
      this.#line.close();
      [this.#line, this.#trial] = [line, null];
    }
    if (this.phase !== 'paused' && hasSlept()) return this.on.slept();
    const isFirst = !line.seen.has(update.asset_id);  // it may be old
    const isNew = !isFirst || (this.answered && this.health.age_seconds === null);
    const isGap = isFirst && !line.follows?.seen.has(update.asset_id);
    line.seen.add(update.asset_id);
    this.#isPolling = false;
    if (isNew) this.polled = now();
    this.on.price(update, { at: this.polled, isNew, isGap });
  }

  #closed(line) {
    if (line === this.#trial) this.#trial = null;
    else if (this.phase === 'opening') this.#fail();
    else this.#lose('lost');
  }

  #fail() {
    const { kind } = this.#line;
    this.#line.close();
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
    this.failures = this.#line?.seen.size ? 1 : this.failures + 1;
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
    else if (!this.#line) this.#openFirst();
  }

  tick(isLive) {
    const { phase } = this, isDue = steady() > this.#deadline, isPast = (at, seconds) => steady() - at > seconds;
    if (phase === 'waiting' && isDue) this.connect();
    else if (phase === 'opening' && isDue) this.answered ? this.#fail() : this.#lose('lost');
    else if (phase === 'open' && isDue && this.answered && !this.isServed) this.#fail();
    else if (phase === 'open' && isPast(this.#healthAsked, CHECK) && !(isLive && this.answered)) this.askHealth();
    else if (phase === 'open' && this.#line.kind === 'stream' && isPast(this.#socketAgain, 0)) this.#trySocket();
    const isShut = phase !== 'open' && (this.trouble === 'full' || this.trouble === 'blocked');
    if (isShut && isPast(this.#pricesAsked, CHECK)) this.#askPrices();
  }

  #trySocket() {
    this.#socketAgain = steady() + SOCKET_AGAIN;
    this.#trial?.close();
    this.#trial = this.#openLine('socket');
  }

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
