// The list of sessions beside the conversation.
import { byId, el, setText } from "./dom.js";
import { ago, STATE_WORDS } from "./format.js";

export const sessionUrl = (session) => `/?session=${encodeURIComponent(session)}`;

/** The list in the sidebar; `open(session)` is called for a plain click, other clicks stay the browser's. */
export class SessionList {
  #items = new Map();

  constructor({ open, more }) {
    this.open = open;
    this.list = byId("sessions");
    this.more = byId("more-sessions");
    this.more.addEventListener("click", more);
  }

  /** Show these sessions, newest first; `now` in seconds since 1970. */
  update(sessions, current, now, hasMore) {
    const kept = new Map();
    const elements = sessions.map((session) => {
      const item = this.#items.get(session.session) ?? this.#build(session.session);
      kept.set(session.session, item);
      this.#fill(item, session, current, now);
      return item.element;
    });
    this.#items = kept;
    if (elements.some((element, index) => this.list.children[index] !== element)) this.list.replaceChildren(...elements);
    else while (this.list.children.length > elements.length) this.list.lastChild.remove();
    byId("no-sessions").hidden = sessions.length > 0;
    this.more.hidden = !hasMore;
  }

  /** Mark the session that is shown. */
  mark(current) {
    for (const [name, { link }] of this.#items) setCurrent(link, name === current);
  }

  #build(name) {
    const item = {
      title: el("span", { class: "session-name" }, name),
      state: el("span", { class: "dot" }),
      facts: el("span", { class: "session-facts" }),
    };
    item.link = el("a", { href: sessionUrl(name) }, item.state, item.title, item.facts);
    item.link.addEventListener("click", (click) => {
      if (click.ctrlKey || click.metaKey || click.shiftKey || click.altKey || click.button !== 0) return;
      click.preventDefault();
      this.open(name);
    });
    item.element = el("li", {}, item.link);
    return item;
  }

  #fill(item, session, current, now) {
    const count = session.generations ?? 0;
    const facts = [`${count} ${count === 1 ? "answer" : "answers"}`, ago(session.updated_at ?? 0, now)];
    setText(item.facts, facts.join(" · "));
    item.state.dataset.state = session.last_state ?? "";
    item.link.title = [session.model, STATE_WORDS[session.last_state]].filter(Boolean).join(" · ");
    setCurrent(item.link, session.session === current);
  }
}

function setCurrent(link, current) {
  if (current) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}
