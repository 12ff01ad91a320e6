import assert from "node:assert/strict";
import { test } from "node:test";
import { nextLook, UsageWatch } from "../../../../services/delivery/console/usage.js";

function watching(look) {
  const heard = [];
  let waited = 0;
  const pause = async (ms) => void (waited += ms);
  return new Promise((done) => {
    const finish = () => setImmediate(() => done({ heard, waited }));
    const watch = new UsageWatch({
      look,
      pause,
      onUsage: (_name, usage) => heard.push(usage.status) && usage.last && finish(),
      onSilence: () => heard.push("silence") && finish(),
    });
    watch.watch("g");
    watch.watch("g");
  });
}

test("billing is asked until it has settled, and then no more", async () => {
  const answers = [null, { status: "running" }, { status: "matched", last: true }, { status: "drift" }];
  const { heard } = await watching(async () => {
    const answer = answers.shift();
    if (!answer) throw new Error("not there yet");
    return answer;
  });
  assert.deepEqual(heard, ["running", "matched"]);
  assert.equal(answers.length, 1);
});

test("billing that never answers is given up after about ten seconds", async () => {
  const { heard, waited } = await watching(async () => {
    throw new Error("not reachable");
  });
  assert.deepEqual(heard, ["silence"]);
  assert.ok(waited >= 10_000 && waited < 12_000);
});

test("looks become rarer and end", () => {
  assert.ok(nextLook(0) < nextLook(1_000));
  assert.equal(nextLook(10_000), null);
});

test("only a few look-ups run at once", async () => {
  let running = 0;
  let most = 0;
  let left = 20;
  await new Promise((done) => {
    const watch = new UsageWatch({
      width: 4,
      pause: async () => {},
      look: async () => {
        most = Math.max(most, ++running);
        await new Promise(setImmediate);
        running -= 1;
        return { status: "matched" };
      },
      onUsage: () => --left || done(),
      onSilence: () => {},
    });
    for (let name = 0; name < 20; name += 1) watch.watch(String(name));
  });
  assert.equal(most, 4);
});
