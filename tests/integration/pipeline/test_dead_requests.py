"""Test dead requests: they fail, are listed, shown, resent and removed, over HTTP and by command."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from schemas.requests import Request
from schemas.subjects import dead_subject, request_subject
from schemas.topology import DEAD
from services.delivery.requests.dead import REASON
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from services.producer.relay import Relay
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import ask, producing
from tests.support.service_processes import REPOSITORY, clean_environment

BODY: dict[str, Any] = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 20, "tokens_per_second": 2_000},
    "metadata": {"user": "u-1"},
    "priority": "batch",
}
FROM_THE_FUTURE = msgspec.json.encode({"tenant": "default", "session": "s", "generation": "future", "model": 5})


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of generations that every producer fails at."""
    names: set[str] = set()
    run = Relay.run

    async def failing(relay: Relay) -> None:
        if relay.request.generation in names:
            raise RuntimeError("poison")
        await run(relay)

    monkeypatch.setattr(Relay, "run", failing)
    return names


async def bury(broker: Broker, generation: str, data: bytes | Request, *, reason: str = "max_deliver") -> None:
    body = data if isinstance(data, bytes) else msgspec.json.encode(data)
    await broker.publish_stored(dead_subject("default", generation), body, headers={REASON: reason})


async def listed(stage: Stage, **query: str) -> list[str]:
    answer = await stage.http.get(f"{stage.url}/v1/requests/dead", params=query)
    assert answer.status_code == 200, answer.text
    return [each["generation"] for each in answer.json()["requests"]]


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].split(";")[0] == "application/problem+json"
    content: dict[str, Any] = answer.json()
    return content


async def ended(stage: Stage, session: str, generation: str) -> dict[str, Any]:
    async def view() -> dict[str, Any] | None:
        path = f"/v1/sessions/{session}/generations/{generation}"
        found: dict[str, Any] = (await stage.http.get(stage.url + path)).json()
        return found if found["state"] in ("completed", "failed") else None

    found: dict[str, Any] = await eventually(view, timeout=20, interval=0.05)
    return found


async def test_a_poison_request_fails_is_listed_resent_and_completes(
    stage: Stage, broker: Broker, poison: set[str]
) -> None:
    asked = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=BODY)
    old = asked.json()["generation"]
    poison.add(old)
    async with producing(broker, max_deliver=1):
        failed = await ended(stage, "s", old)
        assert (failed["state"], failed["code"]) == ("failed", "poison")
        await eventually(lambda: listed(stage))

        [line] = (await stage.http.get(f"{stage.url}/v1/requests/dead")).json()["requests"]
        died_at = line.pop("died_at")
        assert line == {
            "generation": old,
            "session": "s",
            "model": "scripted/story",
            "reason": "max_deliver",
            "readable": True,
        }
        shown = (await stage.http.get(f"{stage.url}/v1/requests/dead/{old}")).json()
        assert shown["raw"] is None
        assert {name: shown["request"][name] for name in BODY} == BODY
        assert shown["request"]["created_at"] <= died_at == shown["died_at"]

        resent = await stage.http.post(f"{stage.url}/v1/requests/dead/{old}/resend")
        assert resent.status_code == 202
        new = resent.json()["generation"]
        assert new != old
        assert resent.headers["location"] == resent.json()["links"]["generation"] == f"/v1/sessions/s/generations/{new}"
        completed = await ended(stage, "s", new)
    assert (completed["state"], completed["metadata"]) == ("completed", {"user": "u-1"})
    assert completed["text"]
    assert await listed(stage) == []
    problem(await stage.http.post(f"{stage.url}/v1/requests/dead/{old}/resend"), 404)


async def test_concurrent_resends_of_a_request_are_one_generation(stage: Stage, broker: Broker) -> None:
    await bury(broker, "old", ask("old"))
    url = f"{stage.url}/v1/requests/dead/old/resend"
    answers = await asyncio.gather(*(stage.http.post(url) for _ in range(8)))
    assert {answer.status_code for answer in answers} <= {202, 404}
    assert len({a.json()["generation"] for a in answers if a.status_code == 202}) == 1
    assert (await broker.js.stream_info("REQUESTS")).state.messages == 1


async def test_a_request_that_the_queue_refuses_stays_among_the_dead(nats_server: NatsServer, broker: Broker) -> None:
    await bury(broker, "old", ask("old"))
    async with delivering(nats_server.url, shared=Shared(nats_url=nats_server.url, max_requests=1)) as stage:
        assert (await stage.http.post(f"{stage.url}/v1/sessions/t/generations", json=BODY)).status_code == 202
        refused = await stage.http.post(f"{stage.url}/v1/requests/dead/old/resend")
        assert problem(refused, 429)["type"] == "urn:tailrace:problem:queue-full"
        assert await listed(stage) == ["old"]


async def test_an_unreadable_request_is_listed_as_such_and_cannot_be_sent_again(stage: Stage, broker: Broker) -> None:
    async with producing(broker):
        await broker.publish_stored(request_subject("default", "future"), FROM_THE_FUTURE)
        await eventually(lambda: listed(stage))
    [line] = (await stage.http.get(f"{stage.url}/v1/requests/dead")).json()["requests"]
    assert (line["generation"], line["readable"], line["session"], line["model"]) == ("future", False, None, None)
    assert "model" in line["reason"]
    shown = (await stage.http.get(f"{stage.url}/v1/requests/dead/future")).json()
    assert (shown["request"], shown["raw"]) == (None, FROM_THE_FUTURE.decode())
    refused = problem(await stage.http.post(f"{stage.url}/v1/requests/dead/future/resend"), 422)
    assert refused["type"] == "urn:tailrace:problem:unreadable-request"
    assert "cannot be read, so it cannot be sent again" in refused["detail"]
    assert await listed(stage) == ["future"]
    assert (await stage.http.delete(f"{stage.url}/v1/requests/dead/future")).status_code == 204
    assert await listed(stage) == []


@pytest.mark.parametrize("data", [b"", b"\xff\xfe{", b'{"tenant": 5}', b"[" * 100_000, b'{"tenant":"\xff"}'])
async def test_the_content_of_an_unreadable_dead_request_is_not_shown(
    stage: Stage, broker: Broker, data: bytes
) -> None:
    await bury(broker, "junk", data, reason="garbled — très")
    assert await listed(stage) == ["junk"]
    shown = (await stage.http.get(f"{stage.url}/v1/requests/dead/junk")).json()
    assert (shown["readable"], shown["request"], shown["raw"]) == (False, None, None)
    assert shown["reason"].startswith("garbled")


async def test_dead_requests_of_other_tenants_and_pools_are_404(stage: Stage, broker: Broker) -> None:
    await bury(broker, "theirs", msgspec.structs.replace(ask("theirs"), tenant="other"))
    await bury(broker, "garbled", b'{"tenant": "other", "model": 5}')
    await broker.publish_stored(dead_subject("elsewhere", "pooled"), msgspec.json.encode(ask("pooled")))
    await bury(broker, "mine", ask("mine"))
    assert await listed(stage, limit="1") == ["mine"]
    for name in ("theirs", "garbled", "pooled"):
        url = f"{stage.url}/v1/requests/dead/{name}"
        problem(await stage.http.get(url), 404)
        problem(await stage.http.post(f"{url}/resend"), 404)
        problem(await stage.http.delete(url), 404)
    assert (await broker.js.stream_info(DEAD)).state.messages == 4


async def test_pages_list_every_dead_request_once_oldest_first(stage: Stage, broker: Broker) -> None:
    names = [f"g{number}" for number in range(7)]
    for name in ["g5", *names]:  # one was put aside twice
        await bury(broker, name, ask(name))
    found: list[str] = []
    after: str | None = None
    while after is not None or not found:
        query = {"limit": "3"} | ({"after": after} if after else {})
        page = (await stage.http.get(f"{stage.url}/v1/requests/dead", params=query)).json()
        found += [each["generation"] for each in page["requests"]]
        after = page["next"]
    assert found == names
    assert await listed(stage, limit="7") == names
    assert (await stage.http.delete(f"{stage.url}/v1/requests/dead/g5")).status_code == 204
    assert await listed(stage) == [name for name in names if name != "g5"]


@pytest.mark.parametrize("query", ["after=x", "after=-1", "after=" + "9" * 30, "limit=0", "limit=201", "limit=x"])
async def test_a_page_that_does_not_exist_is_refused(stage: Stage, query: str) -> None:
    problem(await stage.http.get(f"{stage.url}/v1/requests/dead?{query}"), 400)


async def test_unknown_names_are_404_and_invalid_names_are_400(stage: Stage) -> None:
    for name, status in (("nothing", 404), ("a.b", 400), ("%2A", 400), ("%3E", 400), ("x" * 65, 400)):
        url = f"{stage.url}/v1/requests/dead/{name}"
        problem(await stage.http.get(url), status)
        problem(await stage.http.post(f"{url}/resend"), status)
        problem(await stage.http.delete(url), status)


async def test_the_openapi_document_shows_each_operation_with_an_example(stage: Stage) -> None:
    paths = (await stage.http.get(f"{stage.url}/docs/openapi.json")).json()["paths"]
    one = "/v1/requests/dead/{generation}"
    assert set(paths[one]) == {"get", "delete"}
    for path, method, status in (("/v1/requests/dead", "get", 200), (one, "get", 200), (f"{one}/resend", "post", 202)):
        content = paths[path][method]["responses"][str(status)]["content"]["application/json"]
        assert "demo" in json.dumps(content["examples"])


async def tailrace(stage: Stage, *argv: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "services.standalone.cli", "requests", *argv, "--url", stage.url],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_command_lists_shows_resends_and_drops(stage: Stage, broker: Broker) -> None:
    none = await tailrace(stage, "dead")
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "no dead requests\n")
    await bury(broker, "old", ask("old"))
    await bury(broker, "future", FROM_THE_FUTURE, reason="a model is a text")

    table = await tailrace(stage, "dead")
    header, first, second = table.stdout.splitlines()
    assert header.split() == ["generation", "session", "model", "died", "reason"]
    assert (first.split()[:3], first.split()[-1]) == (["old", "s", "scripted/story"], "max_deliver")
    assert second.startswith("future")
    assert second.endswith("not readable: a model is a text")
    rows = json.loads((await tailrace(stage, "dead", "--json")).stdout)["requests"]
    assert [row["readable"] for row in rows] == [True, False]
    assert json.loads((await tailrace(stage, "show", "old")).stdout)["request"]["messages"][0]["content"] == "rivers"

    resent = await tailrace(stage, "resend", "old")
    assert resent.returncode == 0
    new, state = resent.stdout.split()[:2]
    assert (new.startswith("gen_"), state) == (True, "queued")
    refused = await tailrace(stage, "resend", "future")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "cannot be sent again" in refused.stderr

    dropped = await tailrace(stage, "drop", "future")
    assert (dropped.returncode, dropped.stderr) == (0, "future is removed\n")
    again = await tailrace(stage, "drop", "future")
    assert (again.returncode, again.stderr.count("error:")) == (1, 1)
    assert await listed(stage) == []
    assert (await tailrace(stage, "show", "a.b")).returncode == 2
