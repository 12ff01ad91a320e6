// The figures of a period: tiles, charts with their tables, and how counts and reports agree.
import { columnChart, legend } from "./chart.js";
import { byId, el } from "./dom.js";
import { BILLING_WORDS, number } from "./format.js";
import { amountLines, brief, decimal, share, signed } from "./money.js";
import { byModel, currenciesOf, shortName, stack } from "./series.js";

/** Show named values; one of them may have a `note` and a `tone`. */
export function showTiles(list, tiles) {
  const made = tiles.map(({ name, value, note = "", tone = "" }) =>
    el("div", { class: "tile", "data-tone": tone }, el("dt", {}, name), el("dd", {}, value), el("dd", { class: "note" }, note)),
  );
  list.replaceChildren(...made);
}

/** Build a table: `head` names, `rows` of texts; the first `words` columns are words, the others numbers. */
export function table(caption, head, rows, words = 1) {
  const place = (tag, text, index) => el(tag, { class: index < words ? "word" : "number" }, text);
  const heading = (text, index) => Object.assign(place("th", text, index), { scope: "col" });
  return el(
    "table",
    {},
    el("caption", { class: "hidden" }, caption),
    el("thead", {}, el("tr", {}, ...head.map(heading))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text, index) => place("td", text, index))))),
  );
}

/** What a period came to, from its sums and those of each status. */
export function showPeriod(totals, statuses) {
  const count = (status) => statuses.find(({ key }) => key.status === status)?.totals.generations ?? 0;
  const drifted = count("drift");
  const partial = count("partial");
  const open = count("running") + count("awaiting_provider");
  showTiles(byId("tiles"), [
    { name: "Spend", value: amountLines(totals.amounts) },
    { name: "Tokens", value: number(totals.tokens), note: tokenSources(totals) },
    { name: "Generations", value: number(totals.generations), note: open ? `${number(open)} not settled yet` : "" },
    { name: "Drift", value: number(drifted), note: `${signed(totals.drift)} tokens in all`, tone: drifted ? "bad" : "" },
    { name: "Partial", value: number(partial), note: "failed, cancelled, interrupted", tone: partial ? "warn" : "" },
    { name: "Unpriced", value: number(totals.unpriced), note: "not in the spend", tone: totals.unpriced ? "warn" : "" },
  ]);
}

/** Say where the tokens of a period come from, in numbers that add up to their sum. */
export function tokenSources(totals) {
  const reported = totals.input + totals.output;
  const counted = totals.tokens - reported;
  if (counted < 0) return `${number(reported)} reported, ${number(-counted)} of them not charged`;
  if (!counted) return `${number(totals.input)} in · ${number(totals.output)} out`;
  return `${number(reported)} reported · ${number(counted)} counted`;
}

/** Draw a chart for each currency, and one for tokens. `view` has `rows`, `unit`, `by` and `names` of columns. */
export function showCharts(view) {
  const measures = currenciesOf(view.rows).map((currency) => ({
    title: `Spend in ${currency}`,
    value: (totals) => Number(totals.amounts[currency] ?? 0),
    exact: (totals) => totals.amounts[currency] ?? "0",
    words: (amount) => `${decimal(amount)} ${currency}`,
  }));
  measures.push({ title: "Tokens", value: (t) => t.tokens, exact: (t) => number(t.tokens), words: (n) => `${number(n)} tokens` });
  byId("charts").replaceChildren(...measures.map((measure) => chart(view, measure)).filter(Boolean));
}

function chart({ rows, unit, by, names }, { title, value, exact, words }) {
  const stacked = stack(rows, { unit, by, names, value, weight: (totals) => totals.tokens });
  if (!stacked.most) return null;
  const heading = `${title} by ${by}`;
  const width = Math.max(260, byId("charts").clientWidth - 42); // the panel's padding and border
  stacked.series = stacked.series.map((name) => wordFor(by, name));
  const drawing = { title: heading, stacked, width, words: (name) => shortName(unit, name), value: words, brief };
  const told = rows.filter((row) => value(row.totals)).map((row) => [row.key[unit], wordFor(by, row.key[by]), exact(row.totals)]);
  const alternative = el(
    "details",
    { class: "alternative" },
    el("summary", {}, "As a table"),
    el("div", { class: "wide-content", role: "region", "aria-label": heading, tabIndex: 0 }, table(heading, [unit, by, title], told, 2)),
  );
  return el("section", { class: "panel chart", "aria-label": heading }, el("h3", {}, heading), columnChart(drawing), legend(stacked), alternative);
}

const wordFor = (by, name) => (by === "status" && BILLING_WORDS[name]) || name || "(none)";

/** The model with its provider, which a model's own name may begin with. */
export function modelName({ provider, model }) {
  if (!model) return provider || "(unknown)";
  return !provider || model.startsWith(`${provider}/`) ? model : `${provider}/${model}`;
}

const STATUSES = ["matched", "drift", "provider_missing", "awaiting_provider", "partial", "running"];

/** Tell for each model how its generations were settled, and how far the numbers are apart. */
export function showAgreement(rows) {
  const models = byModel(rows);
  const used = STATUSES.filter((status) => models.some(({ statuses }) => statuses[status]));
  const head = ["Model", "Generations", "Counted", "Reported", "Difference", "Share", ...used.map((s) => BILLING_WORDS[s]), "Unpriced"];
  const lines = models.map((model) => [
    modelName(model),
    number(model.generations),
    number(model.counted),
    number(model.reported),
    signed(model.drift),
    share(model.drift, model.reported),
    ...used.map((status) => number(model.statuses[status])),
    number(model.unpriced),
  ]);
  byId("agreement").hidden = lines.length === 0;
  byId("agreement-table").replaceChildren(table("Counted and reported by model", head, lines));
}
