"""Test server-sent events with third-party clients: Chromium, the npm package, httpx-sse.

Each reads an answer through a proxy that cuts the bytes anywhere, loses its connection, is sent away by the server,
comes back by itself with its last id, and stops at the end. Nothing is lost, nothing comes twice, and no character is
damaged.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from schemas.events import AnyEvent, Completed, Delta, Started
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually, require
from tests.support.browser import Browser
from tests.support.delivery_server import Log, Stage, delivering
from tests.support.splitting_proxy import SplittingProxy, splitting
from tests.support.sse_client import SseClient

pytest_plugins = ("tests.support.browser",)

PACKAGE = "eventsource@4"
SAID = [
    "Grüße",
    " 世界",
    " 👩‍👩‍👧‍👦",
    "\u2028\u2029\x85",
    "line\nline\r\n\r",
    "\ufeffmark",
    "data: x\n\nid: y",
    "\x00",
    " end",
]


def answer(generation: str, times: int = 4) -> list[AnyEvent]:
    events: list[AnyEvent] = [Started(generation=generation, seq=0, model="m", provider="p", upstream_model="u")]
    events += [Delta(generation=generation, seq=n, text=text, tokens=n) for n, text in enumerate(SAID * times, 1)]
    return [*events, Completed(generation=generation, seq=len(events), finish_reason="stop")]


class Client(Protocol):
    """A client under test and the events it received."""

    async def heard(self) -> list[dict[str, Any]]:
        """Return ``kind``, ``id`` and ``data`` of all that came, in its order."""

    async def has_stopped(self) -> bool:
        """Return whether the client has stopped reconnecting."""


class InBrowser:
    """Chromium's EventSource, on a page of the same origin."""

    def __init__(self, opened: Browser) -> None:
        self._browser = opened

    async def open(self, origin: str, url: str) -> None:
        await asyncio.to_thread(self._browser.open, f"{origin}/healthz")
        await asyncio.to_thread(
            self._browser.driver.execute_script,
            """
            window.heard = [];
            window.source = new EventSource(arguments[0]);
            const note = (kind) => (e) => heard.push({ kind, id: e.lastEventId ?? '', data: e.data ?? '' });
            source.onmessage = note('message');
            source.onopen = note('open');
            source.onerror = note('error');
            for (const name of ['bye', 'gap']) source.addEventListener(name, note(name));
            """,
            url,
        )

    async def heard(self) -> list[dict[str, Any]]:
        found = await asyncio.to_thread(self._browser.driver.execute_script, "return window.heard")
        return list(found)

    async def has_stopped(self) -> bool:
        return bool(await asyncio.to_thread(self._browser.driver.execute_script, "return source.readyState === 2"))


class OfNpm:
    """The npm package ``eventsource`` under Node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._heard: list[dict[str, Any]] = []
        self.process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, _origin: str, url: str) -> None:
        script = Path(__file__).with_name("event_source.mjs")
        self.process = await asyncio.create_subprocess_exec(
            "node", str(script), url, cwd=self._folder, stdout=asyncio.subprocess.PIPE, limit=2**20
        )
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self._heard.append(json.loads(line))

    async def heard(self) -> list[dict[str, Any]]:
        return self._heard

    async def has_stopped(self) -> bool:
        return self.process is not None and self.process.returncode == 0

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        if self._reading is not None:
            await self._reading


class OfHttpx:
    """``httpx-sse``, connecting again whenever the response ends."""

    def __init__(self) -> None:
        self._http = httpx.AsyncClient(timeout=20)
        self._task: asyncio.Task[None] | None = None
        self._client: SseClient | None = None

    async def open(self, _origin: str, url: str) -> None:
        address = httpx.URL(url)
        self._client = SseClient(self._http, str(address.copy_with(query=None)), **dict(address.params))
        self._task = asyncio.create_task(self._client.follow(lambda _: False))

    async def heard(self) -> list[dict[str, Any]]:
        assert self._client is not None
        client = self._client
        found = [
            {"kind": "message", "id": id_, "data": json.dumps(event)}
            for id_, event in zip(client.ids, client.events, strict=True)
        ]
        return found + [{"kind": name, "id": "", "data": json.dumps(data)} for name, data in client.controls]

    async def has_stopped(self) -> bool:
        return self._task is not None and self._task.done()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._http.aclose()


@pytest.fixture(scope="session")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    require(shutil.which("node") and shutil.which("npm"), "needs node and npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    require(done.returncode == 0, f"npm cannot install {PACKAGE}: {done.stderr[-200:]}")
    return folder


@pytest.fixture
async def stage(request: pytest.FixtureRequest, broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url, compress=getattr(request, "param", False)) as running:
        yield running


@pytest.fixture
async def proxy(stage: Stage) -> AsyncIterator[SplittingProxy]:
    async with splitting(httpx.URL(stage.url).port or 0) as running:
        yield running


IN_BROWSER = pytest.param("chromium", marks=pytest.mark.browser)


@pytest.fixture(params=[IN_BROWSER, "npm", "httpx"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    match request.param:
        case "chromium":
            yield InBrowser(request.getfixturevalue("browser"))
        case "npm":
            npm = OfNpm(request.getfixturevalue("npm_folder"))
            yield npm
            await npm.close()
        case _:
            own = OfHttpx()
            yield own
            await own.close()


async def messages(client: Client) -> list[dict[str, Any]]:
    return [json.loads(item["data"]) for item in await client.heard() if item["kind"] == "message"]


def brings(client: Client, count: int) -> Callable[[], Any]:
    async def enough() -> bool:
        return len(await messages(client)) >= count

    return enough


def dismiss(stage: Stage, reason: str) -> None:
    for feed in stage.replica.feeds._feeds.values():
        for subscriber in feed.everyone():
            subscriber.stop(reason)


@pytest.mark.parametrize("stage", [False, True], ids=["plain", "gzip"], indirect=True)
async def test_answer_is_complete_after_cuts_reconnections_and_bye(
    stage: Stage, broker: Broker, proxy: SplittingProxy, client: Any
) -> None:
    log, events = Log(broker), answer("g1")
    third = len(events) // 3
    await log.append(*events[:third])
    await client.open(proxy.url, f"{proxy.url}/v1/sessions/s/events?generation=g1")
    await eventually(brings(client, third), timeout=20)
    proxy.drop()
    await log.append(*events[third : 2 * third])
    await eventually(brings(client, 2 * third), timeout=20)
    dismiss(stage, "lifetime")
    await log.append(*events[2 * third :])
    await eventually(brings(client, len(events)), timeout=20)
    await eventually(client.has_stopped, timeout=20)  # 204: nothing follows
    found = await messages(client)
    assert [event["seq"] for event in found] == list(range(len(events)))
    assert [event["text"] for event in found[1:-1]] == SAID * 4
    ids = [item["id"] for item in await client.heard() if item["kind"] == "message"]
    assert ids == sorted(set(ids))
    byes = [json.loads(item["data"]) for item in await client.heard() if item["kind"] == "bye"]
    assert [bye["reason"] for bye in byes] == ["lifetime"]
    assert byes[0]["cursor"] in ids


@pytest.mark.parametrize("client", [IN_BROWSER, "npm"], indirect=True)
async def test_sentences_of_several_sessions_are_complete_after_reconnections(
    stage: Stage, broker: Broker, proxy: SplittingProxy, client: Any
) -> None:
    said = ["One. T", "wo! ", "Thr", "ee? 四。五", "。\nSix"] * 4
    told = {name: Log(broker, name) for name in ("a", "b")}
    await client.open(proxy.url, f"{proxy.url}/v1/events?session=a&session=b&granularity=sentence")

    def is_read() -> bool:
        return sum(len(feed.everyone()) for feed in stage.replica.feeds._feeds.values()) >= len(told)

    await eventually(is_read, timeout=20)

    async def has_said() -> bool:
        return len(await messages(client)) > 0

    for name, log in told.items():
        await log.append(Started(generation=name, seq=0, model="m", provider="p", upstream_model="u"))
    for number, text in enumerate(said, 1):
        for name, log in told.items():
            await log.append(Delta(generation=name, seq=number, text=text, tokens=number))
        if number % 7 == 0:
            # A browser gives up for good when a connection is lost before its answer has begun.
            await eventually(is_read, timeout=20)
            await eventually(has_said, timeout=20)
            proxy.drop()
    for name, log in told.items():
        await log.append(Completed(generation=name, seq=len(said) + 1, finish_reason="stop"))

    async def texts() -> dict[str, str]:
        found = dict.fromkeys(told, "")
        for item in await messages(client):
            found[item["session"]] += item["event"].get("text", "")
        return found

    wanted = dict.fromkeys(told, "".join(said))

    async def whole() -> bool:
        return await texts() == wanted

    await eventually(whole, timeout=20)
    ids = [item["id"] for item in await client.heard() if item["kind"] == "message"]
    assert len(ids) == len(set(ids))


@pytest.mark.browser
async def test_browser_reconnects_after_bye(stage: Stage, broker: Broker, browser: Browser) -> None:
    await Log(broker).append(*answer("g1")[:3])
    client = InBrowser(browser)
    await client.open(stage.url, f"{stage.url}/v1/sessions/s/events")
    await eventually(brings(client, 3), timeout=20)
    dismiss(stage, "drain")

    async def reopened() -> bool:
        return [item["kind"] for item in await client.heard()].count("open") == 2

    await eventually(reopened, timeout=20)
    assert [item["kind"] for item in await client.heard()] == ["open", *["message"] * 3, "bye", "error", "open"]
    assert browser.driver.execute_script("return source.readyState") == 1
    browser.driver.execute_script("source.close()")
