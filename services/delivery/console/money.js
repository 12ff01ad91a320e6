// Billing's answers about usage and money, and amounts as people read them.
import { request } from "./api.js";

const PAGES = 20; // most pages of one question, of 1,000 rows each
const part = encodeURIComponent;

/** Billing at an address. Every method fails with a `Problem`. */
export class Billing {
  constructor(address) {
    this.address = address.replace(/\/$/, "");
  }

  get liveUrl() {
    return `${this.address}/v1/usage/live`;
  }

  /** An address that answers 401 to a key that is not valid. */
  get checkUrl() {
    return `${this.address}/v1/usage?limit=1`;
  }

  /** Return `{rows, complete}`: rows of all pages, as far as they are not too many. */
  async usage(query) {
    const rows = [];
    let cursor = null;
    for (let page = 0; page < PAGES; page += 1) {
      const asked = new URLSearchParams({ ...query, limit: 1_000, ...(cursor ? { cursor } : {}) });
      const answer = await request(`${this.address}/v1/usage?${asked}`);
      rows.push(...answer.rows);
      cursor = answer.next;
      if (!cursor) break;
    }
    return { rows, complete: !cursor };
  }

  async budgets() {
    return (await request(`${this.address}/v1/budgets`)).budgets;
  }

  statement(month) {
    return request(this.#statement(month));
  }

  /** Return a month's statement as a file of this media type. */
  statementFile(month, type) {
    return request(this.#statement(month), { headers: { Accept: type } }, (response) => response.blob());
  }

  #statement(month) {
    return `${this.address}/v1/statements/${part(month)}`;
  }
}

const PLAIN = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 6 });
const TINY = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const BRIEF = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

/** `1,234.50`, `0.000021`, from exact text or a number. */
export const decimal = (amount) => (amount != 0 && Math.abs(amount) < 0.001 ? TINY : PLAIN).format(amount);

/** `12.50 EUR` and `3.00 USD` on lines of their own, or a dash for nothing. */
export const amountLines = (amounts) =>
  Object.entries(amounts)
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([currency, amount]) => `${decimal(amount)}\u00a0${currency}`)
    .join("\n") || "–";

/** `1.2K`, `35M`, for axes. */
export const brief = (amount) => (amount !== 0 && Math.abs(amount) < 0.01 ? TINY : BRIEF).format(amount);

/** `+1.5%`, `−0.2%`: a drift as a share of what was reported; a dash where nothing was. */
export function share(drift, reported) {
  if (!reported) return "–";
  const percent = (100 * drift) / reported;
  const sign = percent > 0 ? "+" : percent < 0 ? "−" : "";
  return `${sign}${Math.abs(percent).toFixed(Math.abs(percent) < 10 ? 1 : 0)}%`;
}

/** A whole number with its sign: `+12`, `−3`, `0`. */
export const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toLocaleString("en")}`;
