// Billing's running totals as they grow. Read with fetch rather than EventSource, which could not show a key.
import { Problem } from "./api.js";
import { credentials } from "./key.js";
import { delayBefore } from "./stream.js";

const MOST = 1_000_000; // characters of one event; more is not billing's

/** Return a function that takes text as it arrives and returns the events that it completes, as `{event, data}`. */
export function eventReader() {
  let rest = "";
  return (text) => {
    const blocks = (rest + text).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    if (rest.length > MOST) throw new Error("an event of the stream does not end");
    return blocks.map(readBlock).filter(({ data }) => data !== "");
  };
}

function readBlock(block) {
  const found = { event: "message", data: "" };
  const lines = [];
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (field === "data") lines.push(value);
    if (field === "event") found.event = value;
  }
  return { ...found, data: lines.join("\n") };
}

const BROWSER = {
  fetch: (url, options) => fetch(url, options),
  after: (delay, act) => setTimeout(act, delay),
  forget: (timer) => clearTimeout(timer),
  random: Math.random,
};

/** Follows the totals at an address: `on.totals(totals)`, and `on.status(kind, problem)` with `live`, `lost` or `refused`. */
export class LiveTotals {
  #abort = null;
  #timer = null;
  #attempt = 0;

  constructor(url, on, parts = BROWSER) {
    Object.assign(this, { url, on, parts });
  }

  /** Connect now, also out of a pause between two attempts. */
  async open() {
    this.close();
    const abort = new AbortController();
    this.#abort = abort;
    try {
      await this.#read(abort.signal);
      this.#retry(abort);
    } catch (error) {
      const isFinal = error instanceof Problem && [400, 401, 403, 404].includes(error.status);
      if (!isFinal) this.#retry(abort);
      else if (abort === this.#abort) this.on.status("refused", error);
    }
  }

  /** Close; nothing is called until `open`. */
  close() {
    this.#abort?.abort();
    this.#abort = null;
    this.parts.forget(this.#timer);
  }

  async #read(signal) {
    const response = await this.parts.fetch(this.url, { headers: { Accept: "text/event-stream", ...credentials() }, signal });
    if (!response.ok) throw await Problem.of(response);
    this.on.status("live");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const events = eventReader();
    for (let read = await reader.read(); !read.done && !signal.aborted; read = await reader.read()) {
      for (const { event, data } of events(read.value)) {
        if (event === "bye") return;
        if (event !== "message" || signal.aborted) continue;
        this.#attempt = 0;
        this.on.totals(JSON.parse(data));
      }
    }
  }

  #retry(abort) {
    if (abort !== this.#abort) return;
    this.on.status("lost");
    this.#timer = this.parts.after(delayBefore(this.#attempt++, this.parts.random()), () => this.open());
  }
}
