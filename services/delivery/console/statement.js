// The statement of a month: shown, printed, and taken along as a file.
import { byId, el, setText } from "./dom.js";
import { table } from "./figures.js";
import { BILLING_WORDS, number } from "./format.js";

const MONTHS = 24;

/** Return the names of this month and those before it, newest first; `now` in ms since 1970. */
export function monthNames(now, count = MONTHS) {
  const today = new Date(now);
  return Array.from({ length: count }, (_, back) =>
    new Date(Date.UTC(today.getUTCFullYear(), today.getUTCMonth() - back, 1)).toISOString().slice(0, 7),
  );
}

/** The panel with statements; `complain(problem)` hears what went wrong. */
export class Statements {
  constructor({ billing, complain, now }) {
    Object.assign(this, { billing, complain });
    byId("month").replaceChildren(...monthNames(now).map((month) => el("option", { value: month }, month)));
    byId("statement-form").onsubmit = (submit) => {
      submit.preventDefault();
      this.#show();
    };
    byId("statement-print").onclick = async () => {
      if (await this.#show()) window.print();
    };
    byId("statement-csv").onclick = () => this.#save("text/csv", "csv");
    byId("statement-json").onclick = () => this.#save("application/json", "json");
  }

  async #show() {
    const place = byId("statement");
    const month = byId("month").value;
    setText(place, "Asking billing …");
    try {
      const made = await this.billing.statement(month);
      place.replaceChildren(...page(made));
      return true;
    } catch (problem) {
      place.replaceChildren();
      this.complain(problem);
      return false;
    }
  }

  async #save(type, ending) {
    const month = byId("month").value;
    try {
      const url = URL.createObjectURL(await this.billing.statementFile(month, type));
      el("a", { href: url, download: `statement-${month}.${ending}` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (problem) {
      this.complain(problem);
    }
  }
}

const HEAD = ["Provider", "Model", "Status", "Amount", "Generations", "Input", "Cached", "Cache write", "For an hour", "Output", "Reasoning", "Charged", "Unpriced"];

const many = (count) => (count === 1 ? "1 generation has" : `${number(count)} generations have`);

function page(made) {
  const notes = [
    made.open ? `${many(made.open)} not settled yet.` : "",
    made.unpriced ? `${many(made.unpriced)} no price yet, and no part in the amounts.` : "",
    made.final ? "" : "This statement is not final.",
  ].filter(Boolean);
  const lines = made.lines.map(({ provider, model, status, totals: t }) => [
    provider,
    model,
    BILLING_WORDS[status] ?? status,
    exactWords(t.amounts),
    ...[t.generations, t.input, t.cached_input, t.cache_write, t.cache_write_1h].map(number),
    ...[t.output, t.reasoning, t.tokens, t.unpriced].map(number),
  ]);
  const caption = `Statement ${made.month}`;
  return [
    el("h4", {}, caption),
    el("p", {}, `Tenant ${made.tenant}, generations started from ${made.since} up to ${made.until}.`),
    el("p", {}, "In all: ", el("strong", { class: "statement-total" }, exactWords(made.amounts))),
    ...notes.map((note) => el("p", { class: "statement-note" }, note)),
    el("div", { class: "wide-content", role: "region", "aria-label": caption, tabIndex: 0 }, table(caption, HEAD, lines, 3)),
  ];
}

/** Amounts to the last digit, as they stand in the ledger. */
const exactWords = (amounts) => Object.entries(amounts).map(([currency, amount]) => `${amount} ${currency}`).join(" · ") || "–";
