// The figures under an answer: counted as it runs, reported by the provider, settled by billing.
import { el, setText } from "./dom.js";
import { isEnded } from "./log.js";
import { BILLING_WORDS, rate, seconds, tokenPair } from "./format.js";

const figure = (name, title) => {
  const value = el("dd", { class: name });
  const element = el("div", { class: `figure figure-${name}`, hidden: true }, el("dt", { title }, title), value);
  return { element, value };
};

// Reported minus counted, with its sign: `+3 out`.
const driftWords = (drift) =>
  ["input", "output"]
    .filter((side) => drift?.[side])
    .map((side) => `${drift[side] > 0 ? "+" : "−"}${Math.abs(drift[side])} ${side === "input" ? "in" : "out"}`)
    .join(" · ");

/** The figures of one generation; `update` takes billing's answer as `usage` (null: not yet, false: none). */
export class Meter {
  #counted = figure("counted", "Counted");
  #reported = figure("reported", "Reported");
  #billing = figure("billing", "Billing");
  #pace = figure("pace", "Pace");
  element = el(
    "dl",
    { class: "meter" },
    this.#counted.element,
    this.#reported.element,
    this.#billing.element,
    this.#pace.element,
  );

  update(generation, usage) {
    const { counted, tokens } = generation;
    const said = usage || {};
    const input = counted?.input || said.counted?.input || 0;
    const estimate = isEnded(generation) && counted && !counted.exact && counted.encoding;
    this.#show(this.#counted, (tokens > 0 || isEnded(generation)) && (estimate ? "≈ " : "") + tokenPair(input, tokens));
    this.#counted.value.title = estimate ? `Estimated with ${counted.encoding}` : (counted?.encoding ?? "");
    this.#showReported(generation, said);
    this.#showBilling(generation, usage);
    this.#showPace(generation);
  }

  #showReported(generation, said) {
    const reported = generation.reported ?? said.reported ?? null;
    this.#show(this.#reported, reported && tokenPair(reported.input, reported.output));
    if (!reported) return;
    const classes = {
      cached_input: "cached",
      cache_write: "written to cache",
      cache_write_1h: "of these for an hour",
      reasoning: "reasoning",
      cost: "cost",
    };
    const details = Object.entries(classes).filter(([field]) => reported[field]);
    this.#reported.value.title = details.map(([field, word]) => `${reported[field]} ${word}`).join(" · ");
  }

  #showBilling(generation, usage) {
    const shown = isEnded(generation) && usage !== null;
    const word = usage === false ? "No answer" : (BILLING_WORDS[usage?.status] ?? usage?.status ?? "");
    const drift = driftWords(usage?.drift);
    this.#show(this.#billing, shown && (usage?.status === "drift" ? `${word} ${drift}` : word));
    this.#billing.value.title = drift && `Reported minus counted: ${drift}`;
    this.#billing.value.dataset.status = (usage && usage.status) || "";
  }

  #showPace(generation) {
    const { startedAt, firstAt } = generation;
    const shown = [];
    const perSecond = rate(generation);
    if (perSecond) shown.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tok/s`);
    if (startedAt && firstAt) shown.push(`first token after ${seconds(Math.max(0, firstAt - startedAt))}`);
    this.#show(this.#pace, shown.join(" · "));
  }

  #show({ element, value }, text) {
    element.hidden = !text;
    if (text) setText(value, text);
  }
}
