"""Test access to durable consumers, invalid requests and the problems they are answered with."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from services.delivery.consumers.tokens import Token
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.consumer_server import Service, Stage, consuming, seqs
from tests.support.delivery_server import TENANT, Log, keys, story


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    async with consuming(nats_url) as running:
        yield running


def calls(service: Service) -> list[tuple[str, str, object]]:
    """Every operation on a consumer that exists."""
    path = service.path
    return [
        ("PUT", path, {"session": "s"}),
        ("GET", path, None),
        ("GET", f"{path}/events?batch=1", None),
        ("POST", f"{path}/acks", {"acks": []}),
        ("POST", f"{path}/pause", None),
        ("POST", f"{path}/resume", None),
        ("GET", f"{path}/dead", None),
        ("GET", f"{path}/dead/e", None),
        ("POST", f"{path}/dead/e/resend", None),
        ("DELETE", f"{path}/dead/e", None),
        ("DELETE", path, None),
    ]


async def ask(stage: Stage, method: str, url: str, body: object) -> httpx.Response:
    return (
        await stage.http.request(method, url, json=body) if body is not None else await stage.http.request(method, url)
    )


async def test_without_credentials_nothing_is_answered(stage: Stage) -> None:
    service = await Service(stage).created(session="s")
    stage.principal = None
    for call in calls(service):
        assert (await ask(stage, *call)).status_code == 401, call


async def test_without_the_scope_everything_is_forbidden(stage: Stage) -> None:
    service = await Service(stage).created(session="s")
    stage.principal = Principal(tenant=TENANT, scopes=frozenset({"read", "start"}))
    for call in calls(service):
        assert (await ask(stage, *call)).status_code == 403, call


async def test_a_consumer_of_another_tenant_is_not_found(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 0))
    service = await Service(stage).created(session="s")
    (event, *_) = await service.batch()
    stage.principal = Principal(tenant="other")
    for call in calls(service)[1:]:
        assert (await ask(stage, *call)).status_code == 404, call
    assert (await stage.http.get(f"{stage.url}/v1/consumers")).json() == {"consumers": []}
    own = await Service(stage).created()
    assert (await own.settle(acks=[event["token"]]))["settled"] == 0
    assert await own.batch() == []
    stage.principal = Principal(tenant=TENANT)
    assert (await service.view())["in_flight"] == 3


async def test_tenants_and_names_with_dashes_are_not_confused(stage: Stage) -> None:
    stage.principal = Principal(tenant="a")
    await Service(stage, "b-c").created()
    stage.principal = Principal(tenant="a-b")
    assert (await stage.http.get(f"{stage.url}/v1/consumers/c")).status_code == 404
    assert (await Service(stage, "c").put(ack_wait=3)).status_code == 201
    assert [c["name"] for c in (await stage.http.get(f"{stage.url}/v1/consumers")).json()["consumers"]] == ["c"]


async def test_session_patterns_must_cover_the_sessions_of_a_consumer(stage: Stage) -> None:
    await Service(stage, "wide").created()
    await Service(stage, "one").created(session="docs-1")
    await Service(stage, "foreign").created(session="mail-1")
    stage.principal = Principal(tenant=TENANT, sessions=("docs-*",))
    assert (await Service(stage, "new").put()).status_code == 403
    assert (await Service(stage, "new").put(session="mail-2")).status_code == 404
    assert (await Service(stage, "new").put(session="docs-2")).status_code == 201
    for name, status in (("wide", 404), ("foreign", 404), ("one", 200)):
        assert (await stage.http.get(f"{stage.url}/v1/consumers/{name}")).status_code == status
    listed = (await stage.http.get(f"{stage.url}/v1/consumers")).json()["consumers"]
    assert [c["name"] for c in listed] == ["new", "one"]


async def test_a_caller_limited_to_sessions_cannot_replace_a_wider_consumer(stage: Stage) -> None:
    await Service(stage).created()
    stage.principal = Principal(tenant=TENANT, sessions=("docs-*",))
    assert (await Service(stage).put(session="docs-1")).status_code == 409


async def test_a_stream_ends_when_its_credentials_expire(stage: Stage) -> None:
    service = await Service(stage).created()
    stage.principal = Principal(tenant=TENANT, expires_at=stage.replica.clock.wall() + 1.5)
    async with service.stream() as lines:
        assert await lines.next() == {"type": "bye", "reason": "expired"}


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"unknown": 1}', 400),
        (b'{"types": []}', 400),
        (b'{"types": ["nonsense"]}', 400),
        (b'{"session": "a.b"}', 400),
        (b'{"session": "*"}', 400),
        (b'{"session": ">"}', 400),
        (b'{"ack_wait": 0}', 400),
        (b'{"max_in_flight": 0}', 400),
        (b'{"max_in_flight": 1000000}', 400),
        (b'{"max_deliver": -1}', 400),
        (b'{"start": "middle"}', 400),
        (b'{"since": -1}', 400),
        (b'{"since": 1e300}', 400),
        (b'{"after": "t1"}', 400),
        (b'{"session": "s", "after": "nonsense"}', 400),
        (b'{"session": "s", "after": "t1000000000000000000000000000000"}', 400),
        (b'{"start": "new", "since": 1}', 400),
        (b"\xff\xfe", 400),
    ],
)
async def test_an_invalid_consumer_specification_is_refused(stage: Stage, wish: bytes, status: int) -> None:
    answer = await stage.http.put(
        f"{stage.url}/v1/consumers/svc", content=wish, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["type"].startswith("urn:tailrace:problem:")
    assert (await stage.http.get(f"{stage.url}/v1/consumers")).json() == {"consumers": []}


@pytest.mark.parametrize("name", ["a.b", "*", "%3E", "a b", "x" * 65, "%00"])
async def test_a_name_that_is_invalid_in_a_subject_is_refused(stage: Stage, name: str) -> None:
    assert (await stage.http.put(f"{stage.url}/v1/consumers/{name}", json={})).status_code == 400


@pytest.mark.parametrize(
    "query",
    [
        "batch=0",
        "batch=1001",
        "batch=x",
        "batch=1&wait=31",
        "batch=1&wait=nan",
        "wait=1",
        "ack=no",
        "x=1",
        "batch=1&batch=2",
    ],
)
async def test_an_invalid_query_is_refused(stage: Stage, query: str) -> None:
    service = await Service(stage).created()
    answer = await stage.http.get(f"{service.path}/events?{query}")
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("application/problem+json")


async def test_forged_tokens_settle_nothing(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 0))
    service = await Service(stage).created()
    (event, *_) = await service.batch()
    for token in ("", "k1", "$JS.ACK.TOKENS_0.billing-0.1.1.1.1.1", event["token"] + "0", "tokens.0.default.s.g"):
        answer = await stage.http.post(f"{service.path}/acks", json={"acks": [event["token"], token]})
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:tailrace:problem:token-invalid")
    real = Token.parse(event["token"])
    made_up = [
        real._replace(seq=10_000).text(),
        real._replace(incarnation="00000000").text(),
        real._replace(partition=200).text(),
    ]
    assert await service.settle(acks=made_up) == {"settled": 0, "unknown": made_up}
    assert (await service.view())["in_flight"] == 3


async def test_a_consumer_beyond_the_limit_is_refused(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url, consumers=2) as stage:
        for name in ("a", "b"):
            await Service(stage, name).created()
        answer = await Service(stage, "c").put()
        assert (answer.status_code, answer.json()["type"]) == (429, "urn:tailrace:problem:too-many-consumers")
        assert (await Service(stage, "a").put(ack_wait=3)).status_code == 200
        assert (await stage.http.delete(Service(stage, "b").path)).status_code == 204
        assert (await Service(stage, "c").put()).status_code == 201


async def test_an_inactive_consumer_is_removed(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url, consumer_inactive=1.0) as stage:
        service = await Service(stage).created()

        async def gone() -> bool:
            return (await stage.http.get(service.path)).status_code == 404

        await eventually(gone, timeout=20, interval=0.1)
        assert await broker.js.consumers_info("CONSUMERS") == []


async def test_a_stored_event_with_line_breaks_is_sent_on_one_line(stage: Stage, broker: Broker) -> None:
    text = json.dumps({"type": "started", "generation": "g", "seq": 0, "model": "m"}, indent=2)
    await Log(broker).append_bytes("g", text.encode())
    for name, accept in (("sse", "text/event-stream"), ("ndjson", "application/x-ndjson")):
        service = await Service(stage, name).created()
        async with service.stream(accept) as lines:
            assert seqs([await lines.next()]) == [("g", 0)]


async def test_consumers_of_two_tenants_get_their_own_events(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 1))
    await broker.publish_stored("tokens.0.other.s.g9", b'{"type":"started","generation":"g9","seq":0}')
    mine = await Service(stage).created()
    assert seqs(await mine.batch()) == keys(story("g1", 1))
    stage.principal = Principal(tenant="other")
    theirs = await Service(stage).created()
    assert seqs(await theirs.batch()) == [("g9", 0)]
