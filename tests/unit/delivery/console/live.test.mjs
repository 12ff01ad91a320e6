import assert from "node:assert/strict";
import { test } from "node:test";
import { eventReader, LiveTotals } from "../../../../services/delivery/console/live.js";

const WIRE = 'data: {"at":1}\r\n\r\n: hb\r\n\r\nevent: bye\r\ndata: {"reason":"expired"}\r\nretry: 2000\r\n\r\n';
const EVENTS = [
  { event: "message", data: '{"at":1}' },
  { event: "bye", data: '{"reason":"expired"}' },
];

test("events are the same however the text is cut, with either line end", () => {
  for (const wire of [WIRE, WIRE.replaceAll("\r", "")]) {
    for (let cut = 0; cut <= wire.length; cut += 1) {
      const read = eventReader();
      assert.deepEqual([...read(wire.slice(0, cut)), ...read(wire.slice(cut))], EVENTS, `cut at ${cut}`);
    }
    const read = eventReader();
    assert.deepEqual([...wire].flatMap((character) => read(character)), EVENTS);
  }
});

test("an event without an end is not kept", () => {
  assert.throws(() => eventReader()(`data: ${"x".repeat(1_000_001)}`));
});

function following(...answers) {
  const heard = [];
  return new Promise((done) => {
    const hear = (word) => heard.push(word);
    const parts = {
      fetch: async () => {
        const answer = answers.shift();
        if (!answer) throw new TypeError("no network");
        return answer;
      },
      after: (_delay, act) => (answers.length ? setImmediate(act) : done(heard)),
      forget: () => {},
      random: () => 0,
    };
    const status = (kind) => hear(kind) && kind === "refused" && done(heard);
    new LiveTotals("http://b/v1/usage/live", { totals: ({ at }) => hear(at), status }, parts).open();
  });
}

test("totals are told, and a farewell is followed by another connection", async () => {
  const heard = await following(new Response(WIRE), new Response('data: {"at":2}\n\n'));
  assert.deepEqual(heard, ["live", 1, "lost", "live", 2, "lost"]);
});

test("a refusal ends it, a failure does not", async () => {
  const heard = await following(new Response("{}", { status: 503 }), new Response("{}", { status: 403 }));
  assert.deepEqual(heard, ["lost", "refused"]);
});
