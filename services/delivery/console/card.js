// One generation on the page: what was asked, the answer as it arrives, and what it cost.
import { answerText, isEnded } from "./log.js";
import { el, setText } from "./dom.js";
import { Meter } from "./meter.js";
import { PartNodes } from "./parts.js";
import { seconds, STATE_WORDS } from "./format.js";

const REASON_WORDS = {
  requested: "Stopped by request.",
  disconnected: "Stopped because nobody was listening.",
  producer_lost: "The producer was lost; what had arrived is kept.",
  length: "The answer reached its length limit.",
  content_filter: "The provider's content filter ended the answer.",
};

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** The element of one generation, kept equal to its state by `update`, which only touches what changed. */
export class Card {
  #take = 0;
  #notices = 0;
  #state = null;

  constructor(generation, { cancel }) {
    this.name = generation.name;
    this.usage = null; // billing's answer, `null` before it came, `false` when there is none
    this.generation = generation;
    this.prompt = el("p", { class: "prompt", hidden: true });
    this.model = el("h3", { class: "model", id: `model-${generation.name}` });
    this.via = el("span", { class: "via" });
    this.badge = el("span", { class: "badge" });
    this.notices = el("ul", { class: "notices", hidden: true });
    this.body = el("div", { class: "body" });
    this.waiting = el("p", { class: "waiting", hidden: true }, "Waiting for a producer");
    this.outcome = el("p", { class: "outcome", hidden: true });
    this.meter = new Meter();
    this.cancel = el("button", { type: "button", class: "small cancel", hidden: true }, "Cancel");
    this.copy = el("button", { type: "button", class: "quiet small copy", hidden: true }, "Copy");
    this.cancel.addEventListener("click", () => cancel(this.generation));
    this.copy.addEventListener("click", () => this.#copyText());
    this.parts = new PartNodes(this.body);
    this.element = el(
      "article",
      { class: "generation", id: generation.name, "aria-labelledby": this.model.id },
      this.prompt,
      el(
        "div",
        { class: "answer" },
        el("header", { class: "answer-head" }, this.model, this.via, this.badge),
        this.notices,
        this.body,
        this.waiting,
        this.outcome,
        el("footer", { class: "answer-foot" }, this.meter.element, el("span", { class: "actions" }, this.copy, this.cancel)),
      ),
    );
  }

  /** Draw the generation as it is now; `replayed` says that what the log keeps has been read. */
  update(generation, replayed) {
    this.generation = generation;
    if (generation.take !== this.#take) {
      this.#take = generation.take;
      this.parts.clear();
    }
    this.parts.update(generation.parts, !isEnded(generation));
    this.#updateHead(generation);
    this.#updateNotices(generation);
    this.#updateOutcome(generation, replayed);
    this.meter.update(generation, this.usage);
  }

  #updateHead(generation) {
    this.prompt.hidden = !generation.prompt;
    setText(this.prompt, generation.prompt ?? "");
    setText(this.model, generation.model || generation.name);
    const via = [generation.provider, generation.upstreamModel].filter(Boolean).join(" / ");
    setText(this.via, via === generation.model ? "" : via);
    if (generation.state === this.#state) return;
    this.#state = generation.state;
    this.element.dataset.state = generation.state;
    setText(this.badge, STATE_WORDS[generation.state] ?? generation.state);
    this.cancel.hidden = isEnded(generation);
    this.cancel.disabled = generation.state === "cancelling";
    this.copy.hidden = !isEnded(generation);
  }

  #updateNotices({ notices }) {
    for (const notice of notices.slice(this.#notices)) {
      const again = notice.delay ? ` Again in ${seconds(notice.delay)}.` : "";
      const words = notice.code === "restarted" ? `Started again: ${notice.message}` : notice.message || notice.code;
      this.notices.append(el("li", { "data-code": notice.code }, words + again));
    }
    this.#notices = notices.length;
    this.notices.hidden = notices.length === 0;
  }

  #updateOutcome(generation, replayed) {
    const { state, read, parts } = generation;
    this.waiting.hidden = !["queued", "running"].includes(state) || parts.length > 0;
    setText(this.waiting, state === "queued" ? "Waiting for a producer" : "Waiting for the first token");
    const lines = [];
    if (generation.truncated) lines.push("The beginning of this answer is no longer kept.");
    if (state === "failed") lines.push(sentence(generation.message || "the provider failed"));
    else lines.push(REASON_WORDS[generation.code ?? generation.reason] ?? "");
    if (isEnded(generation) && read === 0 && replayed) lines.push("The log no longer keeps its text.");
    const text = lines.filter(Boolean).join(" ");
    const code = state === "failed" ? generation.code : "";
    const wanted = text + code;
    if (this.outcome.dataset.text === wanted) return;
    this.outcome.dataset.text = wanted;
    this.outcome.hidden = !wanted;
    this.outcome.replaceChildren(text, ...(code ? [" ", el("code", {}, code)] : []));
  }

  async #copyText() {
    const copied = await navigator.clipboard?.writeText(answerText(this.generation)).then(
      () => "Copied",
      () => "Not allowed",
    );
    setText(this.copy, copied ?? "Not available");
    setTimeout(() => setText(this.copy, "Copy"), 1_500);
  }
}
