"""Test authentication over real HTTP and a real broker: keys, tokens, tickets, their expiry, and CORS."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from schemas.codec import encode_event
from schemas.subjects import Address, token_subject
from schemas.topology import CREDENTIALS_BUCKET, bucket_stream
from services.kit.auth.config import build_authenticator
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import NatsServer, eventually
from tests.support.credentials import ADMIN, bearer, guarded, make_key, problem, requiring, token
from tests.support.delivery_server import Stage, delivering, story
from tests.support.sse_client import SseClient


@pytest.fixture
async def stage(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_url, tmp_path) as running:
        yield running


async def told(broker: Broker, tenant: str, session: str, generation: str) -> None:
    """Write a whole generation into a tenant's log."""
    for event in story(generation, 3):
        subject = token_subject(Address.of(tenant, session, generation, 1))
        await broker.publish_stored(subject, encode_event(event))


async def get(stage: Stage, path: str, credential: str | None = None, **query: str) -> httpx.Response:
    headers = bearer(credential) if credential else {}
    return await stage.http.get(stage.url + path, params=query, headers=headers)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        "Bearer nonsense",
        "Bearer tr_abcdef_" + "x" * 43,
        f"Bearer tr_{ADMIN.id}_" + "x" * 43,
        f"Bearer {ADMIN.text}x",
        ADMIN.text,
        f"Token {ADMIN.text}",
    ],
    ids=[
        "none",
        "empty",
        "no token",
        "basic",
        "nonsense",
        "unknown key",
        "wrong secret",
        "a letter more",
        "no scheme",
        "wrong scheme",
    ],
)
async def test_without_a_valid_credential_every_path_is_401_without_details(stage: Stage, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/sessions", "/v1/sessions/s/events", "/v1/keys"):
        answer = await stage.http.get(stage.url + path, headers=headers)
        detail = problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert ADMIN.text.split("_", 2)[2] not in detail


async def test_two_credentials_at_once_are_refused(stage: Stage) -> None:
    headers = [("Authorization", f"Bearer {ADMIN.text}"), ("Authorization", "Bearer x")]
    problem(await stage.http.get(f"{stage.url}/v1/sessions", headers=headers), 401, "unauthenticated")


async def test_probes_and_the_description_are_open(stage: Stage) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/docs/openapi.json"):
        assert (await get(stage, path)).status_code == 200


async def test_the_operator_makes_keys_for_every_tenant_and_each_sees_its_own(stage: Stage) -> None:
    acme = await make_key(stage, "admin", "read", tenant="acme", name="first")
    globex = await make_key(stage, "admin", tenant="globex")
    own = await make_key(stage, "read", by=acme["key"])
    assert own["tenant"] == "acme"
    listed = (await get(stage, "/v1/keys", acme["key"])).json()["keys"]
    assert [k["id"] for k in listed] == [acme["id"], own["id"]]
    assert {k["id"] for k in (await get(stage, "/v1/keys", ADMIN.text)).json()["keys"]} == {
        acme["id"],
        globex["id"],
        own["id"],
    }
    assert "hash" not in listed[0]
    assert "key" not in listed[0]
    foreign = await stage.http.delete(f"{stage.url}/v1/keys/{globex['id']}", headers=bearer(acme["key"]))
    problem(foreign, 404, "not-found")
    foreign = await stage.http.post(
        f"{stage.url}/v1/keys", json={"scopes": ["read"], "tenant": "globex"}, headers=bearer(acme["key"])
    )
    problem(foreign, 403, "forbidden")


async def test_a_key_cannot_create_keys_with_more_rights_than_its_own(stage: Stage) -> None:
    limited = (await make_key(stage, "admin", "read", sessions=["a-*"]))["key"]
    beyond = ({"scopes": ["start"]}, {"scopes": ["read"]}, {"scopes": ["read"], "sessions": ["a-*", "b"]})
    for wish in beyond:
        problem(await stage.http.post(f"{stage.url}/v1/keys", json=wish, headers=bearer(limited)), 403, "forbidden")
    made = await make_key(stage, "read", by=limited, sessions=["a-*"])
    assert made["sessions"] == ["a-*"]


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": ["read"], "tenant": "a.b"},
        {"scopes": ["read"], "tenant": "acme\n"},
        {"scopes": ["read"], "sessions": []},
        {"scopes": ["read"], "sessions": ["a?"]},
        {"scopes": ["read"], "sessions": ["a\n"]},
        {"scopes": ["read"], "expires_in": 0},
        {"scopes": ["read"], "hash": "0" * 64},
        {"scopes": ["read"], "operator": True},
    ],
)
async def test_an_invalid_key_request_is_refused(stage: Stage, wish: dict[str, object]) -> None:
    answer = await stage.http.post(f"{stage.url}/v1/keys", json=wish, headers=bearer(ADMIN.text))
    problem(answer, 400, "bad-request")


async def test_only_hashes_are_stored(stage: Stage, broker: Broker) -> None:
    made = await make_key(stage, "read")
    stored = [m async for batch in broker.read(bucket_stream(CREDENTIALS_BUCKET), ">") for m in batch]
    assert stored
    assert not any(made["key"].split("_", 2)[2].encode() in m.data for m in stored)


async def test_a_key_and_its_revocation_take_effect_on_another_replica(
    stage: Stage, nats_url: str, tmp_path: Path
) -> None:
    async with guarded(nats_url, tmp_path) as other:
        made = await make_key(stage, "read")
        assert (await get(other, "/v1/sessions", made["key"])).status_code == 200
        answer = await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
        assert answer.status_code == 204
        problem(await get(stage, "/v1/sessions", made["key"]), 401, "unauthenticated")

        async def refused() -> bool:
            return (await get(other, "/v1/sessions", made["key"])).status_code == 401

        await eventually(refused, timeout=5)


async def test_a_key_ends_when_it_expires(stage: Stage) -> None:
    made = await make_key(stage, "read", expires_in=1)
    assert (await get(stage, "/v1/sessions", made["key"])).status_code == 200

    async def refused() -> bool:
        return (await get(stage, "/v1/sessions", made["key"])).status_code == 401

    await eventually(refused, timeout=10)


async def test_a_session_of_another_tenant_is_404_like_a_missing_one(stage: Stage, broker: Broker) -> None:
    await told(broker, "acme", "s", "g1")
    path = "/v1/sessions/s/generations/g1"
    assert (await get(stage, path, token("acme", "read"))).json()["text"]
    foreign = await get(stage, path, token("globex", "read"))
    missing = await get(stage, "/v1/sessions/s/generations/g1", token("nobody", "read"))
    assert problem(foreign, 404, "not-found") == problem(missing, 404, "not-found")


async def test_sessions_outside_the_patterns_are_404(stage: Stage, broker: Broker) -> None:
    await told(broker, "acme", "chat-1", "g1")
    await told(broker, "acme", "mail-1", "g2")
    limited = token("acme", "read", "start", "cancel", sessions="chat-*")
    assert (await get(stage, "/v1/sessions/chat-1/generations/g1", limited)).status_code == 200
    problem(await get(stage, "/v1/sessions/mail-1/generations/g2", limited), 404, "not-found")
    problem(await get(stage, "/v1/sessions/mail-1/events", limited), 404, "not-found")
    wish = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}]}
    for path in ("/v1/sessions/mail-1/generations", "/v1/sessions/mail-1/generations/g2/cancel"):
        problem(await stage.http.post(stage.url + path, json=wish, headers=bearer(limited)), 404, "not-found")


async def test_lists_contain_only_sessions_of_the_credentials(stage: Stage) -> None:
    wish = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}]}
    everything = token("acme", "read", "start")
    for session in ("chat-1", "mail-1"):
        path = f"{stage.url}/v1/sessions/{session}/generations"
        assert (await stage.http.post(path, json=wish, headers=bearer(everything))).status_code == 202
    names = [s["session"] for s in (await get(stage, "/v1/sessions", everything)).json()["sessions"]]
    assert sorted(names) == ["chat-1", "mail-1"]
    limited = await get(stage, "/v1/sessions", token("acme", "read", sessions=["chat-*"]))
    assert [s["session"] for s in limited.json()["sessions"]] == ["chat-1"]
    assert (await get(stage, "/v1/sessions", token("globex", "read"))).json()["sessions"] == []


async def test_a_tenant_in_the_body_changes_nothing(stage: Stage) -> None:
    wish = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}], "tenant": "globex"}
    answer = await stage.http.post(
        f"{stage.url}/v1/sessions/s/generations", json=wish, headers=bearer(token("acme", "start"))
    )
    problem(answer, 400, "bad-request")


async def test_a_large_body_without_credentials_is_refused_before_it_is_read(stage: Stage) -> None:
    answer = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", content=b"x" * 900_000)
    problem(answer, 401, "unauthenticated")


async def ticket(stage: Stage, credential: str, *sessions: str, scopes: tuple[str, ...] = ("read",)) -> str:
    wish = {"sessions": sessions, "scopes": scopes}
    answer = await stage.http.post(f"{stage.url}/v1/tickets", json=wish, headers=bearer(credential))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


async def test_a_ticket_opens_the_streams_of_its_sessions_and_nothing_else(stage: Stage, broker: Broker) -> None:
    await told(broker, "acme", "s", "g1")
    made = await ticket(stage, token("acme", "read", "start"), "s")
    events = stage.events("s", generation="g1", ticket=made)
    assert await events.read_all() == 200
    assert events.events[-1]["type"] == "completed"
    for path in ("/v1/sessions/other/events", "/v1/sessions/s", "/v1/sessions", "/v1/keys"):
        answer = await get(stage, path, ticket=made)
        assert answer.status_code in (401, 404), answer.text
    posted = await stage.http.post(f"{stage.url}/v1/tickets?ticket={made}", json={"sessions": ["s"]})
    problem(posted, 401, "unauthenticated")
    problem(await get(stage, "/v1/sessions", made), 401, "unauthenticated")


async def test_a_ticket_is_valid_on_every_replica(stage: Stage, broker: Broker, nats_url: str, tmp_path: Path) -> None:
    await told(broker, "acme", "s", "g1")
    async with guarded(nats_url, tmp_path) as other:
        made = await ticket(stage, token("acme", "read"), "s")
        assert await other.events("s", generation="g1", ticket=made).read_all() == 200


async def test_a_ticket_cannot_exceed_the_rights_of_its_parent(stage: Stage) -> None:
    limited = token("acme", "read", sessions=["chat-*"])
    for wish, status in (({"sessions": ["mail"]}, 404), ({"sessions": ["chat-1"], "scopes": ["start"]}, 403)):
        answer = await stage.http.post(f"{stage.url}/v1/tickets", json=wish, headers=bearer(limited))
        assert answer.status_code == status
    for wish in ({"sessions": []}, {"sessions": ["chat-1"], "scopes": ["admin"]}, {"sessions": ["*"]}, {}):
        answer = await stage.http.post(f"{stage.url}/v1/tickets", json=wish, headers=bearer(limited))
        problem(answer, 400, "bad-request")


async def test_a_ticket_ends_with_its_parent_key(stage: Stage) -> None:
    made = await make_key(stage, "read")
    entry = await ticket(stage, made["key"], "s")
    await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
    problem(await get(stage, "/v1/sessions/s/events", ticket=entry), 401, "unauthenticated")


async def test_a_ticket_is_refused_after_its_time(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with guarded(nats_url, tmp_path, ticket=1.0) as stage:
        made = await ticket(stage, token("acme", "read"), "s")

        async def late() -> bool:
            async with stage.events("s", ticket=made).connected() as reader:
                return reader.status == 401

        await eventually(late, timeout=10, interval=0.2)


async def reason_of_the_end(events: SseClient, **headers: str) -> str:
    """Read a stream to its end and return the reason in its bye."""
    assert await events.read_all(**headers) == 200
    (name, said) = events.controls[-1]
    assert name == "bye"
    return str(said["reason"])


async def test_a_stream_ends_when_its_credential_expires(stage: Stage) -> None:
    credential = token("acme", "read", exp=time.time() + 2)
    assert await reason_of_the_end(stage.events("s"), **bearer(credential)) == "expired"


async def test_a_stream_opened_with_a_ticket_ends_with_its_parent(stage: Stage) -> None:
    entry = await ticket(stage, token("acme", "read", exp=time.time() + 3), "s")
    assert await reason_of_the_end(stage.events("s", ticket=entry)) == "expired"


async def test_a_stream_ends_within_seconds_when_its_key_is_revoked(stage: Stage) -> None:
    made = await make_key(stage, "read")
    events = stage.events("s")
    async with events.connected(**bearer(made["key"])) as reader:
        assert reader.status == 200
        await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
        await reader.to_the_end()
    assert [(name, said["reason"]) for name, said in events.controls] == [("bye", "expired")]


async def test_cached_keys_work_during_a_broker_outage(own_nats: NatsServer, tmp_path: Path) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        authenticator = build_authenticator(requiring(own_nats.url, tmp_path), "0.0.0.0", broker, SystemClock())
        await broker.apply(Shared().topology())
        async with authenticator.running():
            own_nats.stop()
            await eventually(lambda: not broker.is_connected)
            assert (await authenticator.authenticate(f"Bearer {ADMIN.text}")).operator
            with pytest.raises(Exception, match="cannot be checked now") as unknown:
                await authenticator.authenticate("Bearer tr_abcdef_" + "x" * 43)
            assert getattr(unknown.value, "status", 0) == 503
            own_nats.start()
            await eventually(lambda: broker.is_connected)


async def test_keys_are_invalid_after_their_bucket_is_recreated(stage: Stage, broker: Broker) -> None:
    made = await make_key(stage, "read")
    await broker.js.delete_stream(bucket_stream(CREDENTIALS_BUCKET))
    await broker.apply(Shared().topology())

    async def refused() -> bool:
        return (await get(stage, "/v1/sessions", made["key"])).status_code == 401

    await eventually(refused, timeout=5)
    assert (await get(stage, "/v1/sessions", ADMIN.text)).status_code == 200


async def test_on_loopback_without_credentials_everything_works(broker: Broker, nats_url: str) -> None:
    async with delivering(nats_url) as stage:
        assert (await get(stage, "/v1/sessions")).status_code == 200
        assert (await get(stage, "/v1/sessions", "nonsense")).status_code == 200
        assert (await get(stage, "/v1/keys")).json() == {"keys": []}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.test"}, 403),
        ({"Host": "127.0.0.1.evil.test"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://chat.example.org"}, 200),
    ],
)
async def test_requests_from_other_origins_are_refused_without_credentials(
    broker: Broker, nats_url: str, headers: dict[str, str], status: int
) -> None:
    async with delivering(nats_url, cors_origins=("https://chat.example.org",)) as stage:
        assert (await stage.http.get(f"{stage.url}/v1/sessions", headers=headers)).status_code == status


async def test_cors_headers_are_sent_to_allowed_origins_on_refusals_too(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    origin = "https://chat.example.org"
    async with guarded(nats_url, tmp_path, cors_origins=(origin,)) as stage:
        refused = await stage.http.get(f"{stage.url}/v1/sessions", headers={"Origin": origin})
        problem(refused, 401, "unauthenticated")
        assert refused.headers["access-control-allow-origin"] == origin
        assert refused.headers["access-control-allow-credentials"] == "true"
        assert "Retry-After" in refused.headers["access-control-expose-headers"]
        for method in ("DELETE", "PUT", "POST"):
            ask = {
                "Origin": origin,
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": "authorization, last-event-id, content-type, idempotency-key",
            }
            preflight = await stage.http.options(f"{stage.url}/v1/sessions", headers=ask)
            assert preflight.status_code == 204, preflight.text
            assert preflight.headers["access-control-allow-origin"] == origin
        foreign = await stage.http.get(
            f"{stage.url}/v1/sessions", headers={"Origin": "https://evil.test", **bearer(ADMIN.text)}
        )
        assert "access-control-allow-origin" not in foreign.headers


async def test_every_response_has_the_security_headers(stage: Stage) -> None:
    async with stage.events("s").connected(**bearer(token("acme", "read"))) as reader:
        answers = [
            reader.response,
            await get(stage, "/v1/sessions"),
            await get(stage, "/v1/sessions", ADMIN.text),
            await get(stage, "/v1/nowhere", ADMIN.text),
        ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"].startswith("no-")


async def test_no_secret_appears_in_logs_or_answers(
    stage: Stage, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    made = await make_key(stage, "read", "admin")
    jot = token("acme", "read")
    entry = await ticket(stage, jot, "s")
    bodies = []
    for credential in (made["key"], made["key"][:-1] + "!", jot, jot[:-2], entry, ADMIN.text + "x"):
        for path in ("/v1/sessions", "/v1/keys/%00", "/v1/sessions/%F0", "/v1/sessions/a.b"):
            bodies.append((await get(stage, path, credential, ticket=entry, token=credential)).text)
    for path in (f"/v1/sessions/s/events?ticket={entry}&ticket={entry}", f"/v1/sessions/s/events?a={entry}"):
        bodies.append((await get(stage, path)).text)
    await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
    out, err = capfd.readouterr()
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("http")]  # those tell what this test sends
    said = "\n".join([out, err, *ours])
    for secret in (made["key"], jot, entry, ADMIN.text):
        tail = secret.split("_", 2)[2] if secret.startswith("tr_") else secret.rpartition(".")[2]
        assert tail not in said
    for secret in (made["key"].split("_", 2)[2], ADMIN.text.split("_", 2)[2], jot.rpartition(".")[2]):
        assert not any(secret in body for body in bodies)


async def test_requests_with_unknown_keys_cause_few_broker_requests(stage: Stage) -> None:
    before = stage.broker.client.stats["out_msgs"]
    answers = await asyncio.gather(*(get(stage, "/v1/sessions", f"tr_{n:06d}_" + "x" * 43) for n in range(100)))
    assert {a.status_code for a in answers} == {401}
    assert stage.broker.client.stats["out_msgs"] - before < 50


async def test_the_openapi_document_has_the_bearer_scheme_on_its_operations(stage: Stage) -> None:
    document = (await get(stage, "/docs/openapi.json")).json()
    assert document["components"]["securitySchemes"]["credentials"]["scheme"] == "bearer"
    assert json.dumps(document).count('"credentials"') > 5
