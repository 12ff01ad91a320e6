import assert from "node:assert/strict";
import { test } from "node:test";
import { delayBefore, SessionStream } from "../../../../services/delivery/console/stream.js";

class Connection {
  readyState = 1;
  named = {};
  closed = false;
  constructor(url) {
    this.url = url;
  }
  addEventListener(name, handler) {
    this.named[name] = handler;
  }
  close() {
    this.closed = true;
  }
  send(data, lastEventId) {
    this.onmessage({ data: JSON.stringify(data), lastEventId });
  }
}

function opened(answer = "retry") {
  const made = { connections: [], timers: [], statuses: [], events: [], gaps: [] };
  const parts = {
    connect: (url) => made.connections[made.connections.push(new Connection(url)) - 1],
    probe: async () => answer,
    after: (delay, act) => made.timers.push({ delay, act }),
    forget: () => {},
    random: () => 0.5,
  };
  const on = {
    event: (event) => made.events.push(event),
    gap: (data) => made.gaps.push(data),
    status: ({ kind }) => made.statuses.push(kind),
  };
  made.stream = new SessionStream((cursor) => `/events?after=${cursor}`, on, parts);
  made.stream.open();
  made.connections[0].onopen();
  return made;
}

test("resume connects after the last cursor", () => {
  const { stream, connections, statuses } = opened();
  connections[0].send({ seq: 0 }, "c1");
  stream.drop();
  assert.equal(connections[0].closed, true);
  stream.open();
  assert.equal(connections[1].url, "/events?after=c1");
  assert.deepEqual(statuses, ["connecting", "live", "dropped", "connecting"]);
});

test("a dropped connection delivers nothing more and stays away", () => {
  const { stream, connections, events, timers } = opened();
  stream.drop();
  connections[0].send({ seq: 0 }, "c1");
  connections[0].onerror();
  assert.deepEqual(events, []);
  assert.deepEqual(timers, []);
});

test("a lost connection is retried with growing pauses until it opens", () => {
  const { connections, timers } = opened();
  for (const attempt of [0, 1, 2]) {
    connections[attempt].onerror();
    timers[attempt].act();
  }
  assert.deepEqual(timers.map(({ delay }) => delay), [375, 750, 1500]);
  connections[3].onopen();
  connections[3].onerror();
  assert.equal(timers[3].delay, 375);
});

test("a farewell is followed by resuming with its cursor", () => {
  const { connections, timers } = opened();
  connections[0].send({ seq: 0 }, "c1");
  connections[0].named.bye({ data: '{"reason":"drain","cursor":"c2"}' });
  timers[0].act();
  assert.equal(connections[1].url, "/events?after=c2");
});

test("a gap is passed on", () => {
  const { connections, gaps } = opened();
  connections[0].named.gap({ data: '{"reason":"expired"}' });
  assert.deepEqual(gaps, [{ reason: "expired" }]);
});

for (const [answer, kind] of [["retry", "waiting"], ["ended", "ended"], [{ status: 410 }, "refused"]]) {
  test(`a refused connection whose cause is ${JSON.stringify(answer)} is ${kind}`, async () => {
    const { connections, stream, timers } = opened(answer);
    connections[0].readyState = 2;
    await connections[0].onerror();
    assert.equal(stream.status.kind, kind);
    assert.equal(timers.length, kind === "waiting" ? 1 : 0);
  });
}

test("bytes that are not JSON are passed over", () => {
  const { connections, events } = opened();
  connections[0].onmessage({ data: "{", lastEventId: "c1" });
  assert.deepEqual(events, []);
});

test("pauses stay within their bounds", () => {
  assert.equal(delayBefore(0, 0), 250);
  assert.equal(delayBefore(50, 0.999_999), 15_000);
});
