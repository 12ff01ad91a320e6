import assert from "node:assert/strict";
import { test } from "node:test";
import { modelName, tokenSources } from "../../../../services/delivery/console/figures.js";
import { standing } from "../../../../services/delivery/console/budgets.js";
import { amountLines, Billing, brief, decimal, share, signed } from "../../../../services/delivery/console/money.js";
import { monthNames } from "../../../../services/delivery/console/statement.js";

test("amounts have two places and more where they are needed", () => {
  assert.deepEqual(["1234.5", "0.198", "0", "0.0000214"].map(decimal), ["1,234.50", "0.198", "0.00", "0.0000214"]);
  assert.equal(amountLines({ USD: "3", EUR: "12.5" }), "12.50\u00a0EUR\n3.00\u00a0USD");
  assert.equal(amountLines({}), "–");
  assert.deepEqual([0, 1_200, 0.002].map(brief), ["0", "1.2K", "0.002"]);
});

test("drifts show their sign and their share", () => {
  assert.deepEqual([12, -3, 0].map(signed), ["+12", "−3", "0"]);
  assert.deepEqual([share(5, 100), share(-30, 100), share(0, 10), share(3, 0)], ["+5.0%", "−30%", "0.0%", "–"]);
});

test("a budget stands by what is spent and reserved together", () => {
  const budget = { spent: "8", reserved: "1", soft: "8.5", hard: "10" };
  assert.equal(standing(budget), "soft");
  assert.equal(standing({ ...budget, reserved: "2" }), "hard");
  assert.equal(standing({ ...budget, soft: null }), "ok");
  assert.equal(standing({ ...budget, soft: null, hard: null, spent: "1000" }), "ok");
});

test("months go back from this one, over the turn of years", () => {
  assert.deepEqual(monthNames(Date.UTC(2026, 1, 28), 4), ["2026-02", "2026-01", "2025-12", "2025-11"]);
});

function answering(...pages) {
  const urls = [];
  globalThis.fetch = async (url) => {
    urls.push(new URL(url));
    const body = pages.length > 1 ? pages.shift() : pages[0];
    return { ok: true, status: 200, json: async () => body };
  };
  return urls;
}

test("a report is read page by page to its end", async () => {
  const urls = answering({ rows: [1, 2], next: "c1" }, { rows: [3], next: null });
  assert.deepEqual(await new Billing("http://b/").usage({ group_by: "day,model" }), { rows: [1, 2, 3], complete: true });
  assert.deepEqual(urls.map(({ pathname, searchParams }) => [pathname, searchParams.get("cursor")]), [["/v1/usage", null], ["/v1/usage", "c1"]]);
});

test("a report without an end is given up and said to be incomplete", async () => {
  const urls = answering({ rows: [1], next: "again" });
  assert.equal((await new Billing("http://b").usage({})).complete, false);
  assert.equal(urls.length, 20);
});

test("the parts of a sum of tokens add up", () => {
  assert.equal(tokenSources({ tokens: 309, input: 9, output: 300 }), "9 in · 300 out");
  assert.equal(tokenSources({ tokens: 1_671, input: 64, output: 1_500 }), "1,564 reported · 107 counted");
});

test("a model is shown once, with its provider", () => {
  assert.equal(modelName({ provider: "scripted", model: "scripted/story" }), "scripted/story");
  assert.equal(modelName({ provider: "openai", model: "gpt-4o" }), "openai/gpt-4o");
  assert.equal(modelName({ provider: "", model: "fast" }), "fast");
  assert.equal(modelName({ provider: "openai", model: "" }), "openai");
  assert.equal(modelName({ provider: "", model: "" }), "(unknown)");
});
