// The form at the foot of the page: question, model, Ask.
import { drawName } from "./api.js";
import { byId, el } from "./dom.js";

const OTHER = "\0other";
const MODEL_KEY = "tailrace.model";
const TALLEST = 260; // px

/** The form; `ask({text, model, withHistory, key})` is called and awaited, the question stays where it failed. */
export class Composer {
  #key = null;
  #keyOf = null;

  constructor({ ask }) {
    this.ask = ask;
    this.form = byId("composer");
    this.question = byId("question");
    this.model = byId("model");
    this.other = byId("other-model");
    this.button = byId("ask");
    byId("hint").textContent = "Shift + Enter for a new line";
    this.question.setAttribute("aria-keyshortcuts", "Enter");
    this.form.addEventListener("submit", (submit) => {
      submit.preventDefault();
      this.#send();
    });
    this.question.addEventListener("keydown", (key) => {
      if (key.key !== "Enter" || key.shiftKey || key.isComposing) return; // an input method ends a word by Enter
      key.preventDefault();
      this.form.requestSubmit();
    });
    this.question.addEventListener("input", () => this.#grow());
    this.model.addEventListener("change", () => this.#modelChosen(true));
  }

  /** Offer these models; any other one can be typed. */
  offer(models) {
    this.model.replaceChildren(
      ...models.map((name) => el("option", { value: name }, name)),
      el("option", { value: OTHER }, "Other …"),
    );
    const last = recall();
    if (models.includes(last)) this.model.value = last;
    else if (last || models.length === 0) {
      this.model.value = OTHER;
      this.other.value = last ?? "";
    }
    this.#modelChosen(false);
  }

  /** Put text into the question, ready to be sent or changed. */
  propose(text) {
    this.question.value = text;
    this.#grow();
    this.question.focus();
  }

  async #send() {
    const text = this.question.value.trim();
    const model = (this.model.value === OTHER ? this.other.value : this.model.value).trim();
    if (!text || this.button.disabled) return;
    remember(model);
    this.button.disabled = true;
    try {
      const sent = await this.ask({ text, model, withHistory: byId("history").checked, key: this.#keyFor(text, model) });
      if (!sent) return;
      this.#keyOf = null;
      this.question.value = "";
      this.#grow();
    } finally {
      this.button.disabled = false;
    }
  }

  // The same question sent again after a failure carries the same key: it is answered once.
  #keyFor(text, model) {
    const of = `${location.search}\n${model}\n${text}`;
    if (this.#keyOf !== of) {
      this.#keyOf = of;
      this.#key = drawName("console-", 24);
    }
    return this.#key;
  }

  #modelChosen(byHand) {
    const other = this.model.value === OTHER;
    this.other.hidden = !other;
    this.other.required = other;
    if (other && byHand) this.other.focus();
  }

  #grow() {
    this.question.style.height = "auto";
    this.question.style.height = `${Math.min(TALLEST, this.question.scrollHeight)}px`;
  }
}

function recall() {
  try {
    return localStorage.getItem(MODEL_KEY);
  } catch {
    return null; // storage is forbidden: nothing is remembered
  }
}

function remember(model) {
  try {
    localStorage.setItem(MODEL_KEY, model);
  } catch {
    // as above
  }
}
