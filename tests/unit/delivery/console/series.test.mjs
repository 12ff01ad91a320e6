import assert from "node:assert/strict";
import { test } from "node:test";
import { byModel, columnNames, currenciesOf, shortName, SPANS, stack, startOf, ticks } from "../../../../services/delivery/console/series.js";

const NOW = Date.UTC(2026, 2, 15, 13, 45);

test("spans begin with a whole column and have all columns up to now", () => {
  const columns = Object.fromEntries(Object.entries(SPANS).map(([name, span]) => [name, columnNames(span.unit, startOf(span, NOW), NOW)]));
  assert.deepEqual(Object.values(columns).map((names) => names.length), [24, 7, 30, 90, 12]);
  assert.equal(columns["24h"].at(-1), "2026-03-15T13:00:00Z");
  assert.deepEqual([columns["7d"][0], columns["7d"].at(-1)], ["2026-03-09", "2026-03-15"]);
  assert.deepEqual([columns["12m"][0], columns["12m"].at(-1)], ["2025-04", "2026-03"]);
});

test("columns are named for people", () => {
  assert.equal(shortName("hour", "2026-03-15T13:00:00Z"), "13:00");
  assert.equal(shortName("day", "2026-03-05"), "5 Mar");
  assert.equal(shortName("month", "2025-04"), "Apr 2025");
});

const row = (day, model, tokens, amounts = {}) => ({ key: { day, model }, totals: { tokens, amounts } });
const value = ({ tokens }) => tokens;

test("the largest series comes first, and what is beyond the width is summed up", () => {
  const rows = [row("d1", "a", 1), row("d1", "b", 5), row("d2", "c", 2), row("d2", "b", 1), row("d2", "d", 3)];
  const { series, columns, most } = stack(rows, { unit: "day", by: "model", names: ["d1", "d2", "d3"], value, width: 3 });
  assert.deepEqual(series, ["b", "d", "others"]);
  assert.deepEqual(columns.map(({ values }) => values), [[5, 0, 1], [1, 3, 2], [0, 0, 0]]);
  assert.equal(most, 6);
});

test("stacks of one weight have their series in the same order, whatever they show", () => {
  const rows = [row("d1", "a", 1, { USD: 9 }), row("d1", "b", 5, { USD: 1 }), row("d1", "c", 0, { USD: 2 })];
  const shared = { unit: "day", by: "model", names: ["d1"], weight: value };
  const spend = stack(rows, { ...shared, value: ({ amounts }) => amounts.USD });
  assert.deepEqual([spend.series, spend.columns[0].values], [["b", "a", "c"], [1, 9, 2]]);
  assert.deepEqual(stack(rows.slice(0, 2), { ...shared, value }).series, ["b", "a"]);
});

test("nothing stacks to nothing", () => {
  const { series, most } = stack([row("d1", "a", 0)], { unit: "day", by: "model", names: ["d1"], value });
  assert.deepEqual([series, most], [[], 0]);
});

test("ticks are round, even, and reach above everything", () => {
  assert.deepEqual(ticks(0), [0]);
  assert.deepEqual(ticks(10), [0, 2.5, 5, 7.5, 10]);
  assert.deepEqual(ticks(0.3), [0, 0.1, 0.2, 0.3]);
  for (let most = 1e-6; most < 1e9; most *= 1.37) {
    const marks = ticks(most);
    assert.ok(marks.at(-1) >= most * 0.999_999 && marks.at(-2) < most, `${most}: ${marks}`);
    assert.ok(marks.length >= 2 && marks.length <= 6, `${most}: ${marks}`);
  }
});

test("currencies are those that there are amounts in", () => {
  assert.deepEqual(currenciesOf([row("d", "m", 1, { USD: "1" }), row("d", "m", 1, { EUR: "1", USD: "2" }), row("d", "m", 1)]), ["EUR", "USD"]);
});

test("a model's generations are told by status, and one name at two providers is two models", () => {
  const totals = { generations: 2, counted_output: 10, output: 12, drift: 2, unpriced: 1 };
  const key = { provider: "p", model: "m" };
  const rows = ["matched", "drift"].map((status) => ({ key: { ...key, status }, totals }));
  const models = byModel([...rows, { key: { provider: "q", model: "m", status: "partial" }, totals }]);
  assert.deepEqual(models.map(({ provider, generations, drift }) => [provider, generations, drift]), [["p", 4, 4], ["q", 2, 2]]);
  assert.deepEqual(models[0].statuses, { matched: 2, drift: 2 });
});
