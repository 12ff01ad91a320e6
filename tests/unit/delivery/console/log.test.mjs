import assert from "node:assert/strict";
import { test } from "node:test";
import * as log from "../../../../services/delivery/console/log.js";

const event = (seq, type, fields = {}) => ({ generation: "g", seq, type, ...fields });
const read = (...events) => {
  const state = log.emptyLog();
  for (const each of events) log.accept(state, each);
  return { state, generation: state.generations.get("g") };
};
const started = event(0, "started", { model: "m", provider: "p", upstream_model: "u", at: 1, metadata: { prompt: "Why?" } });
const text = (seq, added, tokens = 0) => event(seq, "delta", { text: added, tokens });

test("deltas of one kind are joined and other kinds stand apart in order", () => {
  const { generation } = read(
    started,
    event(1, "delta", { reasoning: "hm" }),
    event(2, "delta", { reasoning: "m" }),
    text(3, "So "),
    text(4, "it is."),
  );
  assert.deepEqual(generation.parts, [
    { kind: "reasoning", choice: 0, text: "hmm" },
    { kind: "text", choice: 0, text: "So it is." },
  ]);
});

test("alternative answers do not mix", () => {
  const { generation } = read(started, text(1, "a"), event(2, "delta", { text: "b", choice: 1 }), text(3, "A"));
  assert.equal(log.answerText(generation), "aA");
  assert.equal(log.answerText(generation, 1), "b");
});

test("fragments of a tool call are joined by their index", () => {
  const call = (seq, fields) => event(seq, "delta", { tool_call: fields });
  const { generation } = read(
    started,
    call(1, { id: "c0", name: "f", arguments: '{"a"' }),
    call(2, { index: 1, id: "c1", name: "g" }),
    call(3, { arguments: ":1}" }),
  );
  assert.deepEqual(
    generation.parts.map(({ id, name, arguments: joined }) => [id, name, joined]),
    [
      ["c0", "f", '{"a":1}'],
      ["c1", "g", ""],
    ],
  );
});

test("a refusal is a part of its own and what the model says", () => {
  const { generation } = read(
    started,
    event(1, "delta", { reasoning: "hm" }),
    event(2, "delta", { refusal: "I can" }),
    event(3, "delta", { refusal: "not." }),
  );
  assert.deepEqual(generation.parts.at(-1), { kind: "refusal", choice: 0, text: "I cannot." });
  assert.equal(log.answerText(generation), "I cannot.");
});

test("pieces of a file belong together, and a file that does not continue begins anew", () => {
  const binary = (seq, data, fields = {}) => event(seq, "delta", { binary: { media_type: "image/png", data, ...fields } });
  const { generation } = read(started, binary(1, "AA=="), binary(2, "AQ==", { continues: true }), binary(3, "Ag=="));
  assert.deepEqual(
    generation.parts.map(({ kind, mediaType, pieces }) => [kind, mediaType, pieces]),
    [
      ["binary", "image/png", ["AA==", "AQ=="]],
      ["binary", "image/png", ["Ag=="]],
    ],
  );
});

test("sources of a choice stand together, and other content stands in its place", () => {
  const source = (seq, fields, choice = 0) => event(seq, "delta", { choice, annotation: { kind: "url_citation", ...fields } });
  const { generation } = read(
    started,
    text(1, "a"),
    source(2, { url: "https://a.example", number: 1 }),
    event(3, "delta", { extra: { kind: "executed_tools", data: [1] } }),
    event(4, "delta", { signature: { kind: "thinking", data: "c2ln" } }),
    source(5, { title: "B" }),
    source(6, { title: "C" }, 1),
  );
  assert.deepEqual(
    generation.parts.map(({ kind, choice, sources, data }) => [kind, choice, sources?.map(({ title, url }) => title ?? url) ?? data]),
    [
      ["text", 0, undefined],
      ["sources", 0, ["https://a.example", "B"]],
      ["extra", 0, [1]],
      ["sources", 1, ["C"]],
    ],
  );
});

test("a repeated event is dropped and counted and changes nothing", () => {
  const { state, generation } = read(started, text(1, "a"), text(1, "a"), text(2, "b"));
  assert.equal(log.answerText(generation), "ab");
  assert.equal(state.verdicts.duplicate, 1);
  assert.equal(state.received, 4);
});

test("a restart forgets what was shown, and the old epoch is silent afterwards", () => {
  const { state, generation } = read(
    started,
    text(1, "old", 3),
    event(2, "restarted", { epoch: 2, reason: "producer_lost" }),
    text(3, "zombie"),
    event(3, "delta", { epoch: 2, text: "new", tokens: 1 }),
  );
  assert.equal(log.answerText(generation), "new");
  assert.equal(generation.tokens, 1);
  assert.equal(generation.take, 1);
  assert.equal(state.verdicts.zombie, 1);
});

test("the terminal gives state, reason and the final count; usage may still follow", () => {
  const { generation } = read(
    started,
    text(1, "a", 1),
    event(2, "failed", { code: "upstream_cut_off", message: "cut", counted: { input: 3, output: 2 } }),
    event(3, "usage", { usage: { input: 3, output: 2 } }),
    event(4, "usage", { usage: { input: 9, output: 9 }, call: 1 }),
  );
  assert.equal(generation.state, "failed");
  assert.equal(generation.code, "upstream_cut_off");
  assert.equal(generation.tokens, 2);
  assert.deepEqual(generation.reported, { input: 3, output: 2 });
});

test("an event of an unknown type takes its seq and shows nothing", () => {
  const { state, generation } = read(started, event(1, "sparkle"), text(2, "a"));
  assert.equal(log.answerText(generation), "a");
  assert.equal(state.unknown, 1);
});

test("an answer whose beginning has expired goes on from where the log begins", () => {
  const { generation } = read(text(40, "the end"), event(41, "completed"));
  assert.equal(generation.truncated, true);
  assert.equal(generation.state, "completed");
  assert.equal(log.answerText(generation), "the end");
});

test("a hole is not skipped, unless the server announced it", () => {
  const silent = read(started, text(1, "a"), text(3, "c"));
  assert.equal(log.answerText(silent.generation), "a");
  assert.equal(silent.state.verdicts.gap, 1);
  log.announceGap(silent.state);
  log.accept(silent.state, text(3, "c"));
  assert.equal(log.answerText(silent.generation), "ac");
  assert.equal(silent.generation.truncated, true);
});

test("a record is shown until the log tells more, and never over it", () => {
  const state = log.emptyLog();
  const record = { generation: "g", state: "completed", model: "m", created_at: 5, counted: { output: 9 } };
  const generation = log.merge(state, record);
  assert.equal(generation.tokens, 9);
  log.accept(state, started);
  assert.equal(generation.state, "running");
  assert.equal(generation.tokens, 0);
  log.merge(state, record);
  assert.equal(generation.state, "running");
});

test("a generation that was asked for comes last, whatever the clocks say", () => {
  const state = log.emptyLog();
  log.merge(state, { generation: "old", state: "completed", created_at: 9e9 });
  const asked = log.expect(state, "g", { model: "m", prompt: "Why?" });
  assert.ok(asked.order > 9e9);
});

test("only answered questions go along as earlier turns", () => {
  const { state } = read(started, text(1, "Because."), event(2, "completed"));
  log.expect(state, "unanswered", { model: "m", prompt: "And?" });
  assert.deepEqual(log.conversation(state), [
    { role: "user", content: "Why?" },
    { role: "assistant", content: "Because." },
  ]);
  assert.deepEqual(log.conversation(state, 5), []);
});
