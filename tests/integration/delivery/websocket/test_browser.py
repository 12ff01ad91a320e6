"""Test a page in Chromium that reads over a WebSocket, loses it and resumes after its last cursor."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from selenium import webdriver

from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, require
from tests.support.delivery_server import Log, delivering, keys, story

pytest_plugins = ("tests.support.browser",)

READ = """
const [url, done] = arguments;
const seen = [], closes = [];
let cursor = null, sockets = 0;
const connect = () => {
  const socket = new WebSocket(url, ["tailrace.v1.json"]);
  sockets += 1;
  socket.onopen = () => socket.send(JSON.stringify(
    {type: "subscribe", session: "s", generation: "g1", credit: {events: 3}, ...(cursor ? {after: cursor} : {})}));
  socket.onmessage = ({data}) => {
    const message = JSON.parse(data);
    if (message.type === "ping") socket.send(JSON.stringify({type: "pong", id: message.id}));
    if (message.type === "end" || message.type === "error") {
      socket.close(1000);
      done({seen, sockets, closes, protocol: socket.protocol, last: message});
    }
    if (message.type !== "events") return;
    for (const item of message.events) { seen.push(item.event); cursor = item.cursor; }
    if (sockets < 4 && seen.length >= 3 * sockets) { socket.onmessage = null; socket.close(); connect(); return; }
    socket.send(JSON.stringify({type: "ack", session: "s", cursor}));
  };
  socket.onclose = ({code}) => closes.push(code);
};
connect();
"""


@pytest.mark.browser
async def test_page_reads_over_a_websocket_and_resumes(
    broker: Broker,
    nats_server: NatsServer,
    chromium: webdriver.Chrome,
) -> None:
    events = story("g1", 20)
    await Log(broker).append(*events)
    async with delivering(nats_server.url) as stage:

        def run() -> dict[str, object]:
            chromium.get(f"{stage.url}/healthz")
            chromium.set_script_timeout(20)
            found: dict[str, object] = chromium.execute_async_script(READ, stage.url.replace("http", "ws") + "/v1/ws")
            chromium.get("about:blank")
            return found

        found = await asyncio.to_thread(run)
    assert (found["protocol"], found["sockets"]) == ("tailrace.v1.json", 4)
    assert found["last"] == {"type": "end", "session": "s", "generation": "g1", "reason": "complete"}
    assert keys(found["seen"]) == keys(events)  # type: ignore[arg-type]


NODE = """
const socket = new WebSocket(process.argv[2], ["tailrace.v1.json"]);
const seen = [];
socket.onopen = () => socket.send(JSON.stringify({type: "subscribe", session: "s", generation: "g1", window: "auto"}));
socket.onmessage = ({data}) => {
  const message = JSON.parse(data);
  if (message.type === "events") {
    for (const {event} of message.events) seen.push([event.generation, event.seq]);
    socket.send(JSON.stringify({type: "ack", session: "s", cursor: message.events.at(-1).cursor}));
  }
  if (message.type === "end") { console.log(JSON.stringify(seen)); socket.close(); }
};
"""


async def test_node_reads_with_its_own_websocket(broker: Broker, nats_server: NatsServer, tmp_path: Path) -> None:
    node = shutil.which("node")
    flag = "--experimental-websocket"  # of older ones; newer ones take it, and have no need of it
    probe = [str(node), flag, "-e", "process.exit(typeof WebSocket === 'function' ? 0 : 1)"]
    has_one = node is not None and subprocess.run(probe, check=False).returncode == 0
    require(has_one, "needs node with a WebSocket of its own (20.10 or later)")
    events = story("g1", 20)
    await Log(broker).append(*events)
    script = tmp_path / "read.js"
    script.write_text(NODE)
    async with delivering(nats_server.url) as stage:
        process = await asyncio.create_subprocess_exec(
            str(node), flag, str(script), stage.url.replace("http", "ws") + "/v1/ws", stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(20):
            printed, _ = await process.communicate()
    assert [tuple(pair) for pair in json.loads(printed)] == keys(events)
