// The body of an answer: text, reasoning, refusals, tool calls, files, sources and other content; grown, not drawn anew.
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

class RefusalPart {
  #text = new Growing();
  element = el("div", { class: "refusal" }, el("span", { class: "overline" }, "Refused"), el("div", { class: "text" }, this.#text.node));

  draw(part) {
    this.#text.draw(part.text);
  }
}

// Kinds that a browser draws as pictures and never runs; everything else is only offered for download.
const PICTURES = new Set(["image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"]);

class BinaryPart {
  #drawn = 0;
  #running = true;
  #link = el("a", { class: "binary", download: "" });
  element = el("figure", { class: "file" }, this.#link);

  /** Draw a file again only when it has grown, and a picture when it is whole. */
  draw({ mediaType, pieces }, running, last) {
    const arriving = running && last;
    if (pieces.length === this.#drawn && arriving === this.#running) return;
    this.#drawn = pieces.length;
    this.#running = arriving;
    const size = pieces.reduce((bytes, piece) => bytes + sizeOf(piece), 0);
    setText(this.#link, `${mediaType} · ${number(Math.ceil(size / 1_024))} kB${arriving ? " …" : ""}`);
    if (arriving) return;
    const address = `data:${mediaType};base64,${joined(pieces)}`;
    this.#link.href = address;
    if (PICTURES.has(mediaType)) this.element.replaceChildren(el("img", { src: address, alt: "Picture in the answer" }), this.#link);
  }
}

const sizeOf = (base64 = "") => Math.floor((base64.replace(/=+$/, "").length * 3) / 4);

/** Join pieces of base64: text by text where no piece but the last is padded, else by bytes. */
function joined(pieces) {
  if (pieces.slice(0, -1).every((piece) => piece.length % 4 === 0 && !piece.endsWith("="))) return pieces.join("");
  return btoa(pieces.map(atob).join(""));
}

class SourcesPart {
  #drawn = 0;
  #list = el("ol", {});
  element = el("section", { class: "sources", "aria-label": "Sources" }, el("span", { class: "overline" }, "Sources"), this.#list);

  draw({ sources }) {
    for (const source of sources.slice(this.#drawn)) this.#list.append(sourceItem(source));
    this.#drawn = sources.length;
  }
}

function sourceItem({ kind, url, title, quote, number: mark }) {
  const label = title ?? url ?? quote ?? kind;
  // Only addresses of the web become links: a provider's text must not become a script.
  const link = /^https?:\/\//i.test(url ?? "") ? el("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, label) : label;
  const item = el("li", {}, mark === null ? "" : `[${mark}] `, link);
  if (quote && quote !== label) item.append(el("q", {}, quote));
  return item;
}

class ExtraPart {
  element;

  constructor({ name, data }) {
    const content = el("pre", { tabIndex: 0, "aria-label": name }, JSON.stringify(data, null, 2) ?? "");
    this.element = el("details", { class: "extra" }, el("summary", {}, name), content);
  }

  draw() {
    // comes whole
  }
}

const KINDS = {
  text: TextPart,
  reasoning: ReasoningPart,
  refusal: RefusalPart,
  tool: ToolPart,
  binary: BinaryPart,
  sources: SourcesPart,
  extra: ExtraPart,
};
