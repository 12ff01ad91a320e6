"""Test delivery's API except streams: requests, idempotency, cancellation, lookups, refusals, CORS, OpenAPI."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from h2.connection import H2Connection
from h2.events import ResponseReceived
from nats.aio.msg import Msg

from schemas.events import Annotation, Binary, Delta, Extra, Signature, Started, ToolCall
from schemas.requests import Announcement, GenerationRecord, Request
from schemas.subjects import control_subject
from schemas.topology import REGISTRY_BUCKET
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import NatsServer
from tests.support.delivery_server import Log, Stage, delivering, story

BODY: dict[str, Any] = {"model": "scripted/story", "messages": [{"role": "user", "content": "rivers"}]}
MB = 1024 * 1024


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url, cors_origins=("https://app.example",), console=True) as running:
        yield running


async def ask(stage: Stage, body: Any = BODY, *, session: str = "s", **headers: str) -> httpx.Response:
    return await stage.http.post(f"{stage.url}/v1/sessions/{session}/generations", json=body, headers=headers)


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].split(";")[0] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:tailrace:problem:")
    assert problem["title"]
    return problem


async def queued(broker: Broker) -> list[Request]:
    stored = [m async for batch in broker.read("REQUESTS", "requests.>") for m in batch]
    return [msgspec.json.decode(m.data, type=Request) for m in stored]


async def test_accepted_request_is_queued_and_answered_with_its_links(stage: Stage, broker: Broker) -> None:
    body = BODY | {"params": {"temperature": 0.1}, "metadata": {"user": "u"}, "on_disconnect": {"cancel_after": 5}}
    response = await ask(stage, body)
    assert response.status_code == 202
    answer = response.json()
    path = f"/v1/sessions/s/generations/{answer['generation']}"
    assert response.headers["location"] == answer["links"]["generation"] == path
    assert answer["links"]["cancel"] == f"{path}/cancel"
    assert answer["state"] == "queued"
    [request] = await queued(broker)
    assert (request.tenant, request.session, request.generation) == ("default", "s", answer["generation"])
    assert request.params == {"temperature": 0.1}
    assert request.metadata == {"user": "u"}
    assert request.created_at > 0
    view = (await stage.http.get(stage.url + path)).json()
    assert view["state"] == "queued"


MALFORMED: dict[str, bytes] = {
    "no body": b"",
    "not JSON": b"{model: x",
    "not UTF-8": b'{"model":"\xff\xfe","messages":[{"role":"user","content":"x"}]}',
    "half a surrogate": b'{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}',
    "an array": b"[]",
    "null": b"null",
    "a number": b"12",
    "nested without end": b'{"model":"m","messages":[{"role":"user","content":"x"}],"params":{"a":' + b"[" * 100_000,
    "closed nesting": b'{"model":"m","messages":[{"role":"user","content":"x"}],"params":{"a":'
    + b"[" * 50_000
    + b"]" * 50_000
    + b"}}",
    "bytes of nothing": b"\0" * 64,
}
WRONG: dict[str, Any] = {
    "no model": {"messages": BODY["messages"]},
    "no messages": {"model": "m"},
    "empty messages": BODY | {"messages": []},
    "empty model": BODY | {"model": ""},
    "model of a wrong type": BODY | {"model": 7},
    "messages of a wrong type": BODY | {"messages": "hello"},
    "unknown role": BODY | {"messages": [{"role": "wizard", "content": "x"}]},
    "content of a wrong type": BODY | {"messages": [{"role": "user", "content": 5}]},
    "unknown field": BODY | {"tenant": "other"},
    "params of a wrong type": BODY | {"params": []},
    "metadata of a wrong type": BODY | {"metadata": {"a": 1}},
    "too much metadata": BODY | {"metadata": {f"k{n}": "v" for n in range(17)}},
    "unknown wish on disconnect": BODY | {"on_disconnect": "explode"},
    "negative grace": BODY | {"on_disconnect": {"cancel_after": -1}},
    "too long a model": BODY | {"model": "m" * 201},
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_body_is_refused(stage: Stage, broker: Broker, case: str, capfd: Any) -> None:
    response = await stage.http.post(
        f"{stage.url}/v1/sessions/s/generations",
        content=MALFORMED[case],
        headers={"Content-Type": "application/json"},
    )
    assert_problem(response, 400)
    assert not await queued(broker)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("case", WRONG)
async def test_body_of_a_wrong_shape_is_refused_with_the_location_of_the_error(
    stage: Stage, broker: Broker, case: str
) -> None:
    problem = assert_problem(await ask(stage, WRONG[case]), 400)
    assert problem["detail"]
    assert not await queued(broker)


@pytest.mark.parametrize(
    "name", ["a.b", "a%20b", "*", "%3E", "%2A", "a%2Fb", "x" * 65, "%00", "..%2f..", "caf%C3%A9", "a;b", "%ff"]
)
@pytest.mark.parametrize("path", ["/generations", "", "/events", "/generations/g", "/generations/g/cancel"])
async def test_name_that_is_invalid_in_a_subject_is_refused(stage: Stage, name: str, path: str, capfd: Any) -> None:
    method = "POST" if path in ("/generations", "/generations/g/cancel") else "GET"
    url = f"{stage.url}/v1/sessions/{name}{path}"
    response = await stage.http.request(method, url, json=BODY if path == "/generations" else None)
    assert response.status_code in (400, 404), response.text
    assert_problem(response, response.status_code)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("character", ["\n", "\x00", "\x1b", "\x7f", "\x85", "\u2028"])
async def test_control_characters_in_names_of_models_and_labels_are_refused(
    stage: Stage, broker: Broker, character: str
) -> None:
    code = f"U+{ord(character):04X}"
    for name in (f"scripted/{character}story", f"scripted/story{character}"):
        assert code in assert_problem(await ask(stage, BODY | {"model": name}), 400)["detail"]
    labels = BODY | {"metadata": {f"a{character}": "b"}}
    assert code in assert_problem(await ask(stage, labels), 400)["detail"]
    keys = f"{stage.url}/v1/keys"
    made = await stage.http.post(keys, json={"name": f"web{character}", "scopes": ["read"]})
    assert code in assert_problem(made, 400)["detail"]
    assert not await queued(broker)
    assert (await ask(stage, BODY | {"metadata": {"größe": "a\nb"}})).status_code == 202


@pytest.mark.parametrize("name", ["*", "a.b", "%3E", "x" * 65])
async def test_generation_name_that_is_invalid_in_a_subject_is_refused(stage: Stage, name: str) -> None:
    base = f"{stage.url}/v1/sessions/s/generations/{name}"
    assert_problem(await stage.http.get(base), 400)
    assert_problem(await stage.http.post(f"{base}/cancel"), 400)


async def test_body_beyond_the_limit_is_too_large(broker: Broker, nats_server: NatsServer) -> None:
    origin = "https://app.example"
    async with delivering(nats_server.url, max_body=65_536, cors_origins=(origin,)) as stage:
        big = BODY | {"messages": [{"role": "user", "content": "x" * (10 * MB)}]}

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(160):
                yield b"x" * 65_536

        url = f"{stage.url}/v1/sessions/s/generations"
        headers = {"Content-Type": "application/json", "Origin": origin}
        chunked = await stage.http.post(url, content=chunks(), headers=headers)
        for response in (await ask(stage, big, Origin=origin), chunked):
            problem = assert_problem(response, 413)
            assert "65536 bytes" in problem["detail"]
            assert "TAILRACE_DELIVERY_MAX_BODY" in problem["detail"]
            assert response.headers["access-control-allow-origin"] == origin
            assert response.headers["x-content-type-options"] == "nosniff"
        assert (await stage.http.get(f"{stage.url}/healthz")).status_code == 200
        assert not await queued(broker)


@pytest.mark.parametrize("http2", [False, True])
async def test_body_is_refused_by_its_announced_length_alone(
    broker: Broker, nats_server: NatsServer, http2: bool
) -> None:
    """Before its credentials, of which this one has none, and before anything of the body is sent."""
    shared = Shared(nats_url=nats_server.url, auth="required", admin_key_hash=f"abcdefghijkl.{'0' * 64}")
    async with delivering(nats_server.url, shared=shared, max_body=65_536) as stage:
        for headers, status in (
            ({"content-length": "65537"}, 413),
            ({"content-length": "20", "content-encoding": "gzip"}, 415),
            ({"content-length": "20", "content-encoding": "identity"}, 401),
        ):
            async with asyncio.timeout(15):
                assert await answer_to_head(stage, headers, http2=http2) == status


async def answer_to_head(stage: Stage, headers: dict[str, str], *, http2: bool) -> int:
    """Send the head of a request and nothing of its body; return the status of the answer."""
    address, path = urlsplit(stage.url), "/v1/sessions/s/generations"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        if not http2:
            lines = [f"POST {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode())
            return int((await reader.readline()).split()[1])
        connection = H2Connection()
        connection.initiate_connection()
        head = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", path), *headers.items()]
        connection.send_headers(1, head)
        while True:
            writer.write(connection.data_to_send())
            for event in connection.receive_data(await reader.read(65_536)):
                if isinstance(event, ResponseReceived):
                    return int(dict(event.headers)[b":status"])
    finally:
        writer.close()


async def test_compressed_body_is_refused_with_415_and_accept_encoding(stage: Stage, broker: Broker) -> None:
    body = gzip.compress(json.dumps(BODY).encode())
    url = f"{stage.url}/v1/sessions/s/generations"
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await stage.http.post(url, content=body, headers=headers)
    assert "gzip" in assert_problem(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "identity"
    plain = {"Content-Encoding": "identity"}
    assert (await ask(stage, **plain)).status_code == 202


async def test_request_that_the_broker_cannot_take_is_too_large_and_leaves_nothing(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with delivering(nats_server.url, max_body=8 * MB) as stage:
        big = BODY | {"messages": [{"role": "user", "content": "x" * (2 * MB)}]}
        assert "max_payload" in assert_problem(await ask(stage, big), 413)["detail"]
        # What grows when it is queued: 1e5 is written as 100000.0.
        grows = json.dumps(BODY | {"params": {"stop": []}}).replace("[]", "[" + "1e5," * 200_000 + "1e5]")
        url = f"{stage.url}/v1/sessions/s/generations"
        response = await stage.http.post(url, content=grows, headers={"Content-Type": "application/json"})
        assert "max_payload" in assert_problem(response, 413)["detail"]
        assert (await stage.http.get(f"{stage.url}/v1/sessions")).json()["sessions"] == []
        assert not await queued(broker)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "multipart/form-data; boundary=x", "nonsense"]
)
async def test_body_of_another_media_type_is_refused(stage: Stage, content_type: str, capfd: Any) -> None:
    url = f"{stage.url}/v1/sessions/s/generations"
    response = await stage.http.post(url, content=b"model=x", headers={"Content-Type": content_type})
    assert response.status_code in (400, 415)
    assert_problem(response, response.status_code)
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_unknown_model_is_refused_once_producers_have_announced_models(
    broker: Broker, nats_server: NatsServer
) -> None:
    bucket = await broker.bucket(REGISTRY_BUCKET)
    announced = Announcement(aliases={"fast": ["scripted/story"]}, providers=["scripted"])
    await bucket.put("pool.default", msgspec.json.encode(announced))
    async with delivering(nats_server.url) as stage:
        problem = assert_problem(await ask(stage, BODY | {"model": "nobody/knows"}), 422)
        assert problem["type"] == "urn:tailrace:problem:unknown-model"
        assert "fast" in problem["detail"]
        for model in ("fast", "scripted/anything"):
            assert (await ask(stage, BODY | {"model": model})).status_code == 202


async def test_same_key_and_body_give_the_same_generation(stage: Stage, broker: Broker) -> None:
    first = await ask(stage, **{"Idempotency-Key": "k1"})
    second = await ask(stage, **{"Idempotency-Key": "k1"})
    assert first.json()["generation"] == second.json()["generation"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert len(await queued(broker)) == 1


async def test_same_key_with_another_body_is_a_conflict(stage: Stage, broker: Broker) -> None:
    await ask(stage, **{"Idempotency-Key": "k1"})
    problem = assert_problem(await ask(stage, BODY | {"model": "scripted/other"}, **{"Idempotency-Key": "k1"}), 422)
    assert problem["type"] == "urn:tailrace:problem:idempotency-conflict"
    assert len(await queued(broker)) == 1


async def test_same_key_in_another_session_is_another_request(stage: Stage) -> None:
    first = await ask(stage, **{"Idempotency-Key": "k1"})
    second = await ask(stage, session="t", **{"Idempotency-Key": "k1"})
    assert first.json()["generation"] != second.json()["generation"]


@pytest.mark.parametrize("key", ["", "x" * 201])
async def test_key_of_a_wrong_length_is_refused(stage: Stage, key: str) -> None:
    assert_problem(await ask(stage, **{"Idempotency-Key": key}), 400)


async def test_twenty_requests_at_once_under_one_key_make_one_generation(stage: Stage, broker: Broker) -> None:
    answers = await asyncio.gather(*(ask(stage, **{"Idempotency-Key": "k"}) for _ in range(20)))
    assert {a.status_code for a in answers} == {202}
    assert len({a.json()["generation"] for a in answers}) == 1
    assert len(await queued(broker)) == 1


async def test_full_queue_is_refused_with_retry_after_and_the_request_is_removed(
    nats_server: NatsServer, broker: Broker
) -> None:
    shared = Shared(nats_url=nats_server.url, max_requests=2)
    async with delivering(nats_server.url, shared=shared) as stage:
        first = await ask(stage, **{"Idempotency-Key": "first"})
        assert first.status_code == 202
        assert (await ask(stage, session="t")).status_code == 202
        refused = await ask(stage, session="u", **{"Idempotency-Key": "late"})
        assert assert_problem(refused, 429)["type"] == "urn:tailrace:problem:queue-full"
        assert int(refused.headers["retry-after"]) > 0
        assert_problem(await stage.http.get(f"{stage.url}/v1/sessions/u"), 404)
        repeated = await ask(stage, **{"Idempotency-Key": "first"})
        assert repeated.status_code == 202
        assert repeated.json()["generation"] == first.json()["generation"]
        assert (await stage.http.get(f"{stage.url}/v1/sessions/s")).status_code == 200
        await broker.js.purge_stream("REQUESTS")
        assert (await ask(stage, session="u", **{"Idempotency-Key": "late"})).status_code == 202


async def test_list_pages_through_all_sessions_newest_first(stage: Stage) -> None:
    for n in range(7):
        await ask(stage, session=f"s{n}")
    await ask(stage, session="s2")
    seen, after = [], None
    while True:
        page = (
            await stage.http.get(f"{stage.url}/v1/sessions", params={"limit": 3} | ({"after": after} if after else {}))
        ).json()
        seen += page["sessions"]
        after = page["next"]
        if after is None:
            break
    assert [s["session"] for s in seen] == ["s2", "s6", "s5", "s4", "s3", "s1", "s0"]
    assert seen[0]["generations"] == 2
    assert seen[0]["last_state"] == "queued"


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=nowhere", "after=%00", "limit=1&limit=x"])
async def test_list_refuses_invalid_paging_parameters(stage: Stage, query: str) -> None:
    await ask(stage)
    assert_problem(await stage.http.get(f"{stage.url}/v1/sessions?{query}"), 400)


async def test_view_of_a_generation_is_folded_from_the_log_without_a_record(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(
        Started(generation="g1", seq=0, model="m", provider="p", upstream_model="u", metadata={"k": "v"}, at=5.0),
        Delta(generation="g1", seq=1, reasoning="hm ", tokens=1),
        Delta(generation="g1", seq=2, text="Hello ", tokens=2),
        Delta(generation="g1", seq=2, text="Hello ", tokens=2),
        Delta(generation="g1", seq=3, text="world", tokens=3),
        Delta(generation="g1", seq=4, tool_call=ToolCall(index=0, id="c", name="f", arguments='{"a"'), tokens=4),
        Delta(generation="g1", seq=5, tool_call=ToolCall(index=0, arguments=":1}"), tokens=5),
    )
    view = (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1")).json()
    assert view["state"] == "running"
    assert (view["text"], view["reasoning"], view["events"]) == ("Hello world", "hm ", 6)
    assert view["tool_calls"] == [{"index": 0, "id": "c", "name": "f", "arguments": '{"a":1}'}]
    assert view["metadata"] == {"k": "v"}
    assert view["counted"]["output"] == 5


async def test_view_shows_every_kind_of_content_with_its_choice(stage: Stage, broker: Broker) -> None:
    call = ToolCall(index=0, id="a", name="f", arguments="{}")
    contents: list[dict[str, Any]] = [
        {"reasoning": "hm"},
        {"signature": Signature(kind="thinking", data="c2ln")},
        {"refusal": "no"},
        {"tool_call": call},
        {"tool_call": msgspec.structs.replace(call, id="b"), "choice": 1},
        {"binary": Binary(media_type="image/png", data=b"ab")},
        {"binary": Binary(media_type="image/png", data=b"c", continues=True)},
        {"annotation": Annotation(kind="url_citation", url="https://h")},
        {"extra": Extra(kind="executed_tools", data=[1]), "choice": 1},
    ]
    await Log(broker).append(
        Started(generation="g1", seq=0, model="m", provider="p", upstream_model="u"),
        *(Delta(generation="g1", seq=seq, **content) for seq, content in enumerate(contents, 1)),
    )
    view = (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1")).json()
    assert (view["reasoning"], view["refusal"]) == ("hm", "no")
    assert view["alternatives"] == [{"reasoning": "hm", "refusal": "no"}, {"choice": 1}]
    assert [(c.get("choice", 0), c["index"], c["id"]) for c in view["tool_calls"]] == [(0, 0, "a"), (1, 0, "b")]
    assert view["binaries"] == [{"media_type": "image/png", "seq": 6, "size": 3, "data": "YWJj"}]
    assert view["annotations"] == [{"kind": "url_citation", "url": "https://h"}]
    assert view["extras"] == [{"kind": "executed_tools", "data": [1], "choice": 1}]
    first, second = view["messages"]
    assert first["content"] == [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}]
    assert (second["choice"], second["tool_calls"][0]["id"]) == (1, "b")
    again = {"model": "scripted/story", "messages": [*BODY["messages"], *view["messages"]]}
    assert (await ask(stage, again)).status_code == 202, "the messages are taken back as they are"


async def test_view_of_an_ended_generation_has_its_end_and_usage(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 3))
    view = (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1")).json()
    assert view["state"] == "completed"
    assert view["finish_reason"] == "stop"
    assert view["usage"]["output"] == 3
    assert view["text"] == "g1:1 g1:2 g1:3 "


async def test_unknown_session_and_generation_are_not_found(stage: Stage) -> None:
    assert_problem(await stage.http.get(f"{stage.url}/v1/sessions/nobody"), 404)
    assert_problem(await stage.http.get(f"{stage.url}/v1/sessions/nobody/generations/g"), 404)
    assert_problem(await stage.http.post(f"{stage.url}/v1/sessions/nobody/generations/g/cancel"), 404)


async def cancel(stage: Stage, generation: str) -> httpx.Response:
    return await stage.http.post(f"{stage.url}/v1/sessions/s/generations/{generation}/cancel")


async def test_cancel_of_a_queued_generation_is_recorded_and_idempotent(stage: Stage) -> None:
    generation = (await ask(stage)).json()["generation"]
    for _ in range(3):
        response = await cancel(stage, generation)
        assert response.status_code == 202
        assert response.json() == {"generation": generation, "state": "cancelling"}
    view = (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{generation}")).json()
    assert view["state"] == "cancelling"


async def test_cancel_of_a_running_generation_reaches_its_producer(stage: Stage, broker: Broker) -> None:
    heard: list[bytes] = []

    async def producer(message: Msg) -> None:
        heard.append(message.data)
        await message.respond(b"ok")

    generation = (await ask(stage)).json()["generation"]
    await Log(broker).append(*story(generation)[:3])
    await broker.subscribe(control_subject("default", "s", generation), producer)
    await broker.flush()
    assert (await cancel(stage, generation)).json()["state"] == "cancelling"
    assert (await cancel(stage, generation)).status_code == 202
    assert heard == [b"cancel", b"cancel"]


async def test_cancel_of_an_ended_generation_returns_its_final_state(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1"))
    response = await cancel(stage, "g1")
    assert (response.status_code, response.json()) == (200, {"generation": "g1", "state": "completed"})
    bucket = await broker.bucket()
    record = GenerationRecord(
        tenant="default", session="s", generation="g2", state="failed", model="m", created_at=1.0, ended_at=2.0
    )
    await bucket.put("default.s.g2", msgspec.json.encode(record))
    response = await cancel(stage, "g2")
    assert (response.status_code, response.json()["state"]) == (200, "failed")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1", 404),
        ("PUT", "/v1/sessions/s/events", 405),
        ("PUT", "/v1/sessions/s", 405),
        ("GET", "/v1/sessions/s/generations/g/cancel", 405),
        ("PUT", "/healthz", 405),
        ("GET", "/console/../app.py", 404),
        ("GET", "/console/%2e%2e/app.py", 404),
    ],
)
async def test_every_refusal_is_a_problem(stage: Stage, method: str, path: str, status: int) -> None:
    assert_problem(await stage.http.request(method, stage.url + path), status)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5_000)) + b"\r\n",
        b"POST /v1/sessions/s/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000\r\n\r\n{",
        b"POST /v1/sessions/s/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/sessions/s/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET /v1/sessions/s/events?after=\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/sessions/s/events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: \xff\xfe\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=[
        "no HTTP",
        "no such version",
        "huge header",
        "many headers",
        "half a body",
        "negative length",
        "bad chunk",
        "raw byte in query",
        "raw byte in header",
        "huge path",
    ],
)
async def test_garbage_on_the_wire_is_refused_or_closed_and_nothing_breaks(
    stage: Stage, request_bytes: bytes, capfd: Any
) -> None:
    address = urlsplit(stage.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(request_bytes)
        await writer.drain()
        writer.write_eof()
        async with asyncio.timeout(15):
            answer = await reader.read(65_536)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]
    except OSError:
        pass
    finally:
        writer.close()
    assert (await stage.http.get(f"{stage.url}/healthz")).status_code == 200
    assert (await ask(stage)).status_code == 202
    out = "".join(capfd.readouterr())
    assert "Traceback" not in out
    assert "panicked" not in out


async def test_openapi_document_is_valid_and_describes_the_streams(stage: Stage) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    document = (await stage.http.get(f"{stage.url}/docs/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    assert set(document["paths"]) >= {
        "/v1/sessions",
        "/v1/sessions/{session}",
        "/v1/sessions/{session}/events",
        "/v1/sessions/{session}/generations",
        "/v1/sessions/{session}/generations/{generation}",
        "/v1/sessions/{session}/generations/{generation}/cancel",
    }
    examples = document["paths"]["/v1/sessions/{session}/generations"]["post"]["requestBody"]["content"]
    assert "rivers" in json.dumps(examples)


async def test_pages_of_listed_origins_may_call(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1"))
    preflight = await stage.http.options(
        f"{stage.url}/v1/sessions/s/generations",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, idempotency-key",
        },
    )
    assert preflight.status_code in (200, 204)
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "idempotency-key" in preflight.headers["access-control-allow-headers"].lower()
    answer = await ask(stage, Origin="https://app.example")
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    exposed = answer.headers["access-control-expose-headers"].lower()
    assert all(name in exposed for name in ("location", "retry-after", "idempotency-replayed"))
    url = f"{stage.url}/v1/sessions/s/events?generation=g1"
    events = await stage.http.get(url, headers={"Origin": "https://app.example"})
    assert events.headers["access-control-allow-origin"] == "https://app.example"
    refused = await stage.http.get(
        f"{stage.url}/v1/sessions/s/events?generation=no", headers={"Origin": "https://app.example"}
    )
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


async def test_pages_of_other_origins_may_not(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1"))
    url = f"{stage.url}/v1/sessions/s/events?generation=g1"
    allowed = await stage.http.get(url, headers={"Origin": "https://app.example"})
    assert "access-control-allow-origin" in allowed.headers  # and must not stay for others
    for response in (
        await ask(stage, Origin="https://evil.example"),
        await stage.http.get(url, headers={"Origin": "https://evil.example"}),
    ):
        assert "access-control-allow-origin" not in response.headers
    preflight = await stage.http.options(
        f"{stage.url}/v1/sessions/s/generations",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.headers.get("access-control-allow-origin") != "https://evil.example"
    assert preflight.headers.get("access-control-allow-origin") != "*"


async def test_broker_outage_is_503_and_service_recovers_afterwards(own_nats: NatsServer) -> None:
    async with delivering(own_nats.url) as stage:
        assert (await ask(stage)).status_code == 202
        own_nats.stop()
        async with asyncio.timeout(40):
            stage.http.timeout = httpx.Timeout(20)
            assert_problem(await ask(stage), 503)
            assert_problem(await stage.http.get(f"{stage.url}/v1/sessions"), 503)
            assert_problem(await stage.http.get(f"{stage.url}/v1/sessions/other/events"), 503)
            assert (await stage.http.get(f"{stage.url}/readyz")).status_code == 503
            assert (await stage.http.get(f"{stage.url}/healthz")).status_code == 200
        own_nats.start()
        async with asyncio.timeout(20):
            while (await stage.http.get(f"{stage.url}/readyz")).status_code != 200:
                await asyncio.sleep(0.1)
        assert (await ask(stage)).status_code == 202
