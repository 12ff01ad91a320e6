// One connection to a session's events: opened, dropped and resumed by its cursor.
import { Problem, readTicket } from "./api.js";
import { credentials, hasKey } from "./key.js";
import { TicketSource } from "./source.js";

const CLOSED = 2; // EventSource.CLOSED, also where no EventSource is defined
const FIRST_DELAY = 500;
const LONGEST_DELAY = 15_000;

/** Return milliseconds before the next attempt (0, 1, 2 …): doubling, with a random half, `random` in [0, 1). */
export function delayBefore(attempt, random) {
  const longest = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** attempt);
  return Math.round(longest * (0.5 + 0.5 * random));
}

/** Ask why an event stream was refused: `retry`, `ended`, or the problem that asking again would not cure. */
export async function probe(url) {
  const abort = new AbortController();
  try {
    const response = await fetch(url, { headers: { Accept: "text/event-stream", ...credentials() }, signal: abort.signal });
    if (response.status === 204) return "ended";
    const passing = response.ok || response.status >= 500 || [408, 425, 429].includes(response.status);
    return passing ? "retry" : await Problem.of(response);
  } catch {
    return "retry";
  } finally {
    abort.abort();
  }
}

/** Return the name of the session whose events are at an address. */
const sessionAt = (url) => decodeURIComponent(url.split("/")[3]);

const BROWSER = {
  connect: (url) => (hasKey() ? new TicketSource(url, () => readTicket(sessionAt(url))) : new EventSource(url)),
  probe,
  after: (delay, act) => setTimeout(act, delay),
  forget: (timer) => clearTimeout(timer),
  random: Math.random,
};

/**
 * A stream of events that survives lost connections.
 *
 * `address(cursor)` returns the URL to read from. `on.event(event)`, `on.gap(data)` and `on.status(status)` are
 * called; a status has `kind`: `connecting`, `live`, `waiting` (with `delay` in ms), `dropped`, `refused` (with
 * `problem`), `ended` or `idle`. The page reconnects by itself rather than leaving it to the browser, because
 * only so it knows why a connection failed, and resumes with a cursor that can be seen.
 */
export class SessionStream {
  #source = null;
  #timer = null;
  #attempt = 0;
  #closed = false;

  constructor(address, on, parts = BROWSER) {
    this.address = address;
    this.on = on;
    this.parts = parts;
    this.cursor = null;
    this.status = { kind: "idle" };
  }

  /** Connect now, after the last cursor; also out of a pause between two attempts. */
  open() {
    this.#disconnect();
    this.#closed = false;
    this.#become({ kind: "connecting" });
    const source = this.parts.connect(this.address(this.cursor));
    this.#source = source;
    source.onopen = () => this.#opened(source);
    source.onmessage = (message) => this.#received(source, message);
    source.onerror = () => this.#failed(source);
    source.addEventListener("gap", (message) => source === this.#source && this.on.gap(read(message.data)));
    source.addEventListener("bye", (message) => this.#dismissed(source, read(message.data)));
  }

  /** Really close the connection and stay away until `open`. */
  drop() {
    this.#disconnect();
    this.#become({ kind: "dropped" });
  }

  /** Close for good; nothing is called afterwards. */
  close() {
    this.#disconnect();
    this.#closed = true;
  }

  #opened(source) {
    if (source !== this.#source) return;
    this.#attempt = 0;
    this.#become({ kind: "live" });
  }

  #received(source, message) {
    if (source !== this.#source) return;
    const event = read(message.data);
    if (message.lastEventId) this.cursor = message.lastEventId;
    if (event) this.on.event(event);
  }

  async #failed(source) {
    if (source !== this.#source) return;
    const refused = source.readyState === CLOSED;
    this.#disconnect();
    if (!refused) return this.#retry();
    this.#become({ kind: "waiting", delay: 0 });
    const waiting = this.status;
    const answer = await this.parts.probe(this.address(this.cursor));
    if (this.status !== waiting || this.#closed) return undefined;
    if (answer === "retry") return this.#retry();
    return this.#become(answer === "ended" ? { kind: "ended" } : { kind: "refused", problem: answer });
  }

  #dismissed(source, data) {
    if (source !== this.#source) return;
    // The server moves its clients on, all at once: come back soon, but not together.
    if (data?.cursor) this.cursor = data.cursor;
    this.#disconnect();
    this.#retry();
  }

  #retry() {
    const delay = delayBefore(this.#attempt, this.parts.random());
    this.#attempt += 1;
    this.#become({ kind: "waiting", delay });
    this.#timer = this.parts.after(delay, () => this.open());
  }

  #disconnect() {
    this.parts.forget(this.#timer);
    this.#timer = null;
    this.#source?.close();
    this.#source = null;
  }

  #become(status) {
    this.status = status;
    if (!this.#closed) this.on.status(status);
  }
}

function read(data) {
  try {
    return JSON.parse(data);
  } catch {
    return null; // not ours to break on: the next event is judged by its seq
  }
}
