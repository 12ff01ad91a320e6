// Drawings as inline SVG: stacked columns over time, and bars of budgets. Colours stand in the sheet, by class.
import { el } from "./dom.js";
import { ticks } from "./series.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 200;
const MARGIN = { top: 10, right: 2, bottom: 24, left: 52 };
const LABEL = 58; // px that the label of a column needs
let drawn = 0;

/** Build an SVG element; everything in `attributes` becomes one. */
export function shape(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** An image with a name and a description for those who do not see it. */
function picture(title, description, size, ...children) {
  const id = `picture-${++drawn}`;
  return shape(
    "svg",
    { role: "img", "aria-labelledby": `${id}-title ${id}-desc`, viewBox: `0 0 ${size.width} ${size.height}`, ...size, class: "picture" },
    shape("title", { id: `${id}-title` }, title),
    shape("desc", { id: `${id}-desc` }, description),
    ...children,
  );
}

/**
 * Draw stacked columns, `width` px wide. `stacked` comes from `series.stack`; `words` returns a column's name for people,
 * `value` a value in full, `brief` one for the axis.
 */
export function columnChart({ title, stacked, width, words, value, brief }) {
  const marks = ticks(stacked.most);
  const top = marks.at(-1) || 1;
  const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
  const y = (amount) => MARGIN.top + inner.height * (1 - amount / top);
  const lines = marks.map((mark) =>
    shape(
      "g",
      { class: mark ? "grid" : "grid base" },
      shape("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(mark), y2: y(mark) }),
      shape("text", { x: MARGIN.left - 8, y: y(mark), dy: "0.32em", "text-anchor": "end" }, brief(mark)),
    ),
  );
  const step = inner.width / stacked.columns.length;
  const columns = stacked.columns.map((column, index) => {
    const x = MARGIN.left + index * step;
    return drawColumn(column, stacked.series, { x, step, y, words, value });
  });
  const largest = stacked.columns.reduce((a, b) => (b.sum > a.sum ? b : a));
  const description = `${stacked.columns.length} columns from ${words(stacked.columns[0].name)} to ${words(stacked.columns.at(-1).name)}. The highest is ${words(largest.name)} with ${value(largest.sum)}.`;
  return picture(title, description, { width, height: HEIGHT }, ...lines, ...columns, ...axis(stacked.columns, step, words));
}

function drawColumn(column, series, { x, step, y, words, value }) {
  const gap = Math.min(step * 0.25, 6);
  const width = Math.min(step - gap, 48);
  const left = x + (step - width) / 2;
  let below = 0;
  const parts = column.values.map((amount, index) => {
    const [from, to] = [y(below), y(below + amount)];
    below += amount;
    if (!amount) return null;
    const said = `${words(column.name)}, ${series[index]}: ${value(amount)}`;
    const box = { x: left, y: to, width, height: Math.max(from - to, 0.75) };
    return shape("rect", { class: `part series-${index}`, ...box }, shape("title", {}, said));
  });
  return shape("g", { class: "column" }, ...parts.filter(Boolean));
}

function axis(columns, step, words) {
  const every = Math.max(1, Math.ceil(LABEL / step));
  const last = columns.length - 1;
  return columns
    .map((column, index) => [column, index])
    .filter(([, index]) => (last - index) % every === 0)
    .map(([column, index]) => {
      const x = MARGIN.left + (index + 0.5) * step;
      const isOuter = step < LABEL && index === last;
      const place = isOuter ? { x: MARGIN.left + (index + 1) * step, "text-anchor": "end" } : { x, "text-anchor": "middle" };
      return shape("text", { class: "tick", y: HEIGHT - 7, ...place }, words(column.name));
    });
}

/** Return what the colours of a chart stand for, as far as they occur in it. */
export function legend({ series, columns }) {
  const swatch = (index) =>
    shape("svg", { width: 10, height: 10, "aria-hidden": "true" }, shape("rect", { class: `part series-${index}`, width: 10, height: 10, rx: 2 }));
  const items = series.map((name, index) => columns.some(({ values }) => values[index]) && el("li", {}, swatch(index), el("span", {}, name)));
  return el("ul", { class: "legend" }, ...items.filter(Boolean));
}

/** Draw where a budget stands: `spent`, `reserved`, and the limits `soft` and `hard` (null: none), all as numbers. */
export function budgetBar({ title, description, spent, reserved, soft, hard }) {
  const whole = Math.max(hard ?? 0, soft ?? 0, spent + reserved) || 1;
  const at = (amount) => (1_000 * Math.min(amount, whole)) / whole;
  const parts = [
    shape("rect", { class: "rail", width: 1_000, height: 10 }),
    shape("rect", { class: hard !== null && spent + reserved >= hard ? "spent over" : "spent", width: at(spent), height: 10 }),
    shape("rect", { class: "reserved", x: at(spent), width: at(reserved), height: 10 }),
  ];
  for (const [name, limit] of [["soft", soft], ["hard", hard]]) {
    if (limit !== null) parts.push(shape("rect", { class: `limit ${name}`, x: Math.min(at(limit), 996), width: 4, height: 10 }));
  }
  const bar = picture(title, description, { width: 1_000, height: 10 }, ...parts);
  bar.setAttribute("preserveAspectRatio", "none");
  bar.classList.add("bar-of-budget");
  return bar;
}
