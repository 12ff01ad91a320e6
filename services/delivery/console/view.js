// The page around the conversation: connection, answers, problems, announcements.
import { Card } from "./card.js";
import { byId, perFrame, setText } from "./dom.js";
import { isEnded } from "./log.js";
import { number, seconds, shortCursor, STATE_WORDS } from "./format.js";
import { sessionUrl } from "./sessions.js";

const NEAR_END = 80; // px from the end within which the page follows new text

const LINK_WORDS = {
  idle: "Not connected",
  connecting: "Connecting",
  live: "Live",
  dropped: "Dropped",
  ended: "Ended",
  refused: "Refused",
};

/** Draws a session. Changes are collected and drawn once per animation frame. */
export class View {
  #cards = new Map();
  #changed = new Set();
  #following = true;
  #log = null;
  #stream = null;

  constructor({ cancel }) {
    this.cancel = cancel;
    this.replayed = false;
    this.scroll = byId("scroll");
    this.answers = byId("answers");
    this.redraw = perFrame(() => this.#draw());
    this.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    byId("latest").addEventListener("click", () => this.follow());
    byId("problem-close").addEventListener("click", () => this.hideProblem());
  }

  /** Begin with another session (`null`: none yet), its log and its stream. */
  show(session, log, stream) {
    this.#cards.clear();
    this.#changed.clear();
    this.answers.replaceChildren();
    this.#log = log;
    this.#stream = stream;
    this.replayed = false;
    byId("session-head").hidden = !session;
    setText(byId("session-title"), session ?? "");
    byId("second-tab").href = session ? sessionUrl(session) : "/";
    document.title = session ? `${session} · Tailrace` : "Tailrace";
    this.#following = true;
    this.redraw();
  }

  /** Note that a generation has changed. */
  change(generation) {
    this.#changed.add(generation);
    this.redraw();
  }

  /** Billing has answered about a generation, or (`false`) has not. */
  setUsage(generation, usage) {
    const card = this.#card(generation);
    card.usage = usage;
    this.change(generation);
  }

  /** What the log keeps has been read: a generation without text will not get one. */
  setReplayed() {
    this.replayed = true;
    for (const generation of this.#log.generations.values()) this.change(generation);
  }

  /** Go to the newest text and stay there. */
  follow() {
    this.#following = true;
    this.redraw();
  }

  /** Say something to people who do not see the page. */
  announce(text) {
    setText(byId("announcer"), text);
  }

  /** Show an error until it is dismissed or cured; `action` offers a way out. */
  showProblem(problem, action = null) {
    setText(byId("problem-title"), `${problem.title.replace(/\.$/, "")}.`);
    const faults = (problem.errors ?? []).map((fault) => Object.values(fault).join(": ")).join("; ");
    setText(byId("problem-detail"), problem.detail || faults || "");
    setText(byId("problem-code"), problem.status ? `${problem.status} ${problem.slug}`.trim() : "");
    const button = byId("problem-action");
    button.hidden = !action;
    setText(button, action?.label ?? "");
    button.onclick = () => {
      this.hideProblem();
      action.act();
    };
    byId("problem").hidden = false;
  }

  hideProblem() {
    byId("problem").hidden = true;
  }

  #card(generation) {
    let card = this.#cards.get(generation.name);
    if (card) return card;
    card = new Card(generation, { cancel: this.cancel });
    this.#cards.set(generation.name, card);
    const later = [...this.#cards.values()].filter((other) => other.generation.order > generation.order);
    const next = later.sort((a, b) => a.generation.order - b.generation.order)[0];
    this.answers.insertBefore(card.element, next?.element ?? null);
    return card;
  }

  #draw() {
    if (!this.#log) return;
    for (const generation of this.#changed) this.#card(generation).update(generation, this.replayed);
    this.#changed.clear();
    this.#drawConnection();
    const named = !byId("session-head").hidden;
    byId("welcome").hidden = named || this.#cards.size > 0;
    byId("empty").hidden = !named || this.#cards.size > 0;
    byId("history-line").hidden = this.#cards.size === 0;
    if (this.#following) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.#scrolled();
  }

  #drawConnection() {
    const { status, cursor } = this.#stream;
    const { received, verdicts } = this.#log;
    const state = byId("link-state");
    state.dataset.kind = status.kind;
    setText(state, status.kind === "waiting" ? waitingWords(status) : LINK_WORDS[status.kind]);
    this.answers.dataset.link = status.kind;
    setText(byId("received"), number(received));
    setText(byId("duplicates"), number(verdicts.duplicate));
    byId("duplicates").classList.toggle("bad", verdicts.duplicate > 0);
    const missing = verdicts.gap + verdicts.zombie + verdicts.ended;
    byId("missing-pair").hidden = missing === 0;
    setText(byId("missing"), number(missing));
    setText(byId("cursor"), cursor ? shortCursor(cursor) : "–");
    byId("cursor").title = cursor ?? "";
    this.#drawButtons(status.kind);
  }

  #drawButtons(kind) {
    const drop = byId("drop");
    const resume = byId("resume");
    const focused = document.activeElement === drop || document.activeElement === resume;
    drop.hidden = !["connecting", "live", "waiting"].includes(kind);
    resume.hidden = !["dropped", "waiting", "refused"].includes(kind);
    if (focused && document.activeElement === document.body) (drop.hidden ? resume : drop).focus();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    const atEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.#following = atEnd;
    byId("latest").hidden = atEnd;
  }
}

const waitingWords = ({ delay }) => (delay ? `Lost · again in ${seconds(delay / 1_000)}` : "Lost · asking why");

/** Say in words how a generation stands. */
export function spoken(generation) {
  if (!isEnded(generation)) return `Answer ${STATE_WORDS[generation.state].toLowerCase()}`;
  const why = generation.state === "failed" ? `: ${generation.message || generation.code}` : "";
  return `Answer ${STATE_WORDS[generation.state].toLowerCase()}${why}, ${number(generation.tokens)} tokens`;
}
