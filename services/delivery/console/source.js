// An EventSource for those who need credentials: it can send no header, so it shows a ticket that was just asked for.

const CLOSED = 2; // EventSource.CLOSED

/** Behaves like an EventSource that does not reconnect by itself: a ticket is good for moments. */
export class TicketSource {
  readyState = 0;
  onopen = null;
  onmessage = null;
  onerror = null;
  #source = null;
  #named = [];

  /** `ticket()` returns a ticket or fails; `make(url)` returns an EventSource. */
  constructor(url, ticket, make = (address) => new EventSource(address)) {
    this.#connect(url, ticket, make);
  }

  addEventListener(name, handler) {
    this.#named.push([name, handler]);
    this.#source?.addEventListener(name, handler);
  }

  close() {
    this.readyState = CLOSED;
    this.#source?.close();
  }

  async #connect(url, ticket, make) {
    let shown;
    try {
      shown = await ticket();
    } catch {
      return this.#fail(); // why is found by asking for the stream itself
    }
    if (this.readyState === CLOSED) return undefined;
    const source = make(`${url}${url.includes("?") ? "&" : "?"}ticket=${encodeURIComponent(shown)}`);
    this.#source = source;
    source.onopen = (event) => {
      this.readyState = 1;
      this.onopen?.(event);
    };
    source.onmessage = (event) => this.onmessage?.(event);
    source.onerror = () => {
      const refused = source.readyState === CLOSED;
      source.close();
      if (refused) return this.#fail();
      return this.onerror?.();
    };
    for (const [name, handler] of this.#named) source.addEventListener(name, handler);
    return undefined;
  }

  #fail() {
    if (this.readyState === CLOSED) return;
    this.readyState = CLOSED;
    this.onerror?.();
  }
}
