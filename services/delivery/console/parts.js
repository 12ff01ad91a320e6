// The body of an answer: text, reasoning, tool calls and binary parts; grown, not drawn anew.
import { el, setText } from "./dom.js";
import { layout, number } from "./format.js";

/** Draws the parts of one answer into `body`. */
export class PartNodes {
  #nodes = [];

  constructor(body) {
    this.body = body;
  }

  /** Forget what was drawn. */
  clear() {
    this.#nodes = [];
    this.body.replaceChildren();
  }

  /** Draw what came since the last time. Parts only grow, and new ones only come at the end. */
  update(parts, running) {
    parts.forEach((part, index) => {
      this.#nodes[index] ??= this.#add(part, running);
      this.#nodes[index].draw(part, running, index === parts.length - 1);
    });
  }

  #add(part, running) {
    const node = new KINDS[part.kind](part, running);
    if (part.choice > 0) node.element.dataset.choice = `Choice ${part.choice + 1}`;
    this.body.append(node.element);
    return node;
  }
}

/** A text node that grows by what is new. */
class Growing {
  #drawn = 0;
  node = document.createTextNode("");

  draw(text) {
    if (text.length === this.#drawn) return;
    this.node.appendData(text.slice(this.#drawn));
    this.#drawn = text.length;
  }
}

class TextPart {
  #text = new Growing();
  element = el("div", { class: "text" }, this.#text.node);

  draw(part) {
    this.#text.draw(part.text);
  }
}

class ReasoningPart {
  #text = new Growing();
  #touched = false;
  #summary = el("summary", {}, "Reasoning");
  element = el("details", { class: "reasoning" }, this.#summary, el("div", {}, this.#text.node));

  constructor(_part, running) {
    this.element.open = running;
    this.#summary.addEventListener("click", () => (this.#touched = true));
  }

  draw(part, running, last) {
    this.#text.draw(part.text);
    // Open while the model thinks, closed once it answers, unless somebody chose otherwise.
    if (!this.#touched && (!running || !last)) this.element.open = false;
    setText(this.#summary, running && last ? "Reasoning …" : "Reasoning");
  }
}

class ToolPart {
  #name = el("strong");
  #id = el("span", { class: "mono muted" });
  #state = el("span", { class: "tool-state" });
  #text = new Growing();
  #arguments = el("pre", { tabIndex: 0, "aria-label": "Arguments" }, this.#text.node);
  #whole = false;
  element = el(
    "section",
    { class: "tool", "aria-label": "Tool call" },
    el("header", {}, el("span", { class: "overline" }, "Tool call"), this.#name, this.#id, this.#state),
    this.#arguments,
  );

  draw(part, running) {
    if (this.#whole) return;
    setText(this.#name, part.name ?? "…");
    setText(this.#id, part.id ?? "");
    if (running) {
      this.#text.draw(part.arguments);
      setText(this.#state, "arriving");
      return;
    }
    this.#whole = true;
    setText(this.#arguments, layout(part.arguments));
    setText(this.#state, isJson(part.arguments) ? "" : "incomplete");
  }
}

const isJson = (text) => {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
};

class BinaryPart {
  element = el("a", { class: "binary", download: "" });

  constructor({ mediaType, data }) {
    setText(this.element, `${mediaType} · ${number(Math.ceil(((data?.length ?? 0) * 3) / 4 / 1_024))} kB`);
    this.element.href = `data:${mediaType};base64,${data}`;
  }

  draw() {
    // a binary part comes whole
  }
}

const KINDS = { text: TextPart, reasoning: ReasoningPart, tool: ToolPart, binary: BinaryPart };
