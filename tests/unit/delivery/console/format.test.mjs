import assert from "node:assert/strict";
import { test } from "node:test";
import { ago, layout, rate, seconds, shortCursor, tokenPair } from "../../../../services/delivery/console/format.js";

test("times read naturally", () => {
  assert.deepEqual([0.08, 1.239, 12.34, 125].map(seconds), ["80 ms", "1.24 s", "12.3 s", "2 min 5 s"]);
  assert.deepEqual([0, 300, 7_300, 200_000].map((passed) => ago(0, passed)), ["just now", "5 min ago", "2 h ago", "2 d ago"]);
  assert.equal(ago(100, 0), "just now");
});

test("a long cursor keeps its moving end", () => {
  assert.equal(shortCursor("c1"), "c1");
  assert.equal(shortCursor("t100aaaaaaaabbbbbbbb00000000002a"), "t100…000000002a");
});

test("an unknown input is left out", () => {
  assert.equal(tokenPair(0, 1_234), "1,234 out");
  assert.equal(tokenPair(12, 3), "12 in · 3 out");
});

test("no pace is claimed from too little", () => {
  assert.equal(rate({ tokens: 3, firstAt: 1, lastAt: 2 }), null);
  assert.equal(rate({ tokens: 40, firstAt: 1, lastAt: 3 }), 20);
});

test("only whole JSON is laid out", () => {
  assert.equal(layout('{"a":1}'), '{\n  "a": 1\n}');
  assert.equal(layout('{"a":'), '{"a":');
});
