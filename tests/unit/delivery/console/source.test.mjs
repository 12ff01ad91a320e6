import assert from "node:assert/strict";
import { test } from "node:test";
import { credentials } from "../../../../services/delivery/console/key.js";
import { TicketSource } from "../../../../services/delivery/console/source.js";

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
}

const settled = () => new Promise((done) => setTimeout(done, 0));

async function opened(ticket = async () => "a+b") {
  const made = { connections: [], said: [] };
  const make = (url) => made.connections[made.connections.push(new Connection(url)) - 1];
  made.source = new TicketSource("/events?after=c", ticket, make);
  made.source.onopen = () => made.said.push("open");
  made.source.onmessage = ({ data }) => made.said.push(data);
  made.source.onerror = () => made.said.push(`error ${made.source.readyState}`);
  made.source.addEventListener("bye", () => made.said.push("bye"));
  await settled();
  return made;
}

test("a connection shows the ticket that was asked for it", async () => {
  const { connections, said } = await opened();
  assert.equal(connections[0].url, "/events?after=c&ticket=a%2Bb");
  connections[0].onopen();
  connections[0].onmessage({ data: "x" });
  connections[0].named.bye();
  assert.deepEqual(said, ["open", "x", "bye"]);
});

test("without a ticket the source is closed like a refused one", async () => {
  const { connections, said } = await opened(async () => {
    throw new Error("no");
  });
  assert.deepEqual(connections, []);
  assert.deepEqual(said, ["error 2"]);
});

test("a broken connection is not made again with the same ticket", async () => {
  const { connections, said } = await opened();
  connections[0].onopen();
  connections[0].readyState = 0;
  connections[0].onerror();
  assert.equal(connections[0].closed, true);
  assert.deepEqual(said, ["open", "error 1"]);
});

test("a source closed while its ticket is on the way never connects", async () => {
  const made = { connections: [] };
  const source = new TicketSource("/events", async () => "t", (url) => made.connections.push(url));
  source.close();
  await settled();
  assert.deepEqual(made.connections, []);
});

test("without a key no header is sent", () => {
  assert.deepEqual(credentials(), {});
});
