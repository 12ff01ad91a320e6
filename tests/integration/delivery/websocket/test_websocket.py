"""WebSockets over a real server and a real broker: reading, credit, windows, several sessions, starting, the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from schemas.events import Binary, Delta
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story
from tests.support.websocket_client import JSON, MSGPACK, SocketClient, socket

BODY = {"model": "scripted/story", "messages": [{"role": "user", "content": "hello"}]}


def open_subscriptions() -> float:
    return metric("tailrace_delivery_subscribers", transport="websocket")


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await eventually(lambda: open_subscriptions() == 0 and metric("tailrace_delivery_sockets") == 0)


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


@pytest.mark.parametrize("subprotocol", [JSON, MSGPACK, None])
async def test_generation_is_read_to_its_end(stage: Stage, log: Log, subprotocol: str | None) -> None:
    events = story("g1")
    await log.append(*events)
    async with socket(stage.url, subprotocol) as client:
        assert client.connection.subprotocol == subprotocol
        answer = await client.ask("subscribe", id=1, session="s", generation="g1")
        assert (answer["type"], answer["session"]) == ("subscribed", "s")
        end = await client.hear("end")
        assert end == {"type": "end", "session": "s", "generation": "g1", "reason": "complete"}
    assert keys(client.events["s"]) == keys(events)
    assert client.cursors["s"] == sorted(set(client.cursors["s"]))


async def test_json_frames_contain_the_stored_bytes(stage: Stage, log: Log) -> None:
    stored = b'{"type":"delta","generation":"g1","seq":0,"text":"\\u00e9  spaced","unknown":{"kept":[1.50]}}'
    await log.append_bytes("g1", stored)
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", from_="start")
        while True:
            data = await client.connection.recv()
            assert isinstance(data, str)
            if json.loads(data)["type"] == "events":
                break
    assert stored.decode() in data


async def test_binary_content_is_bytes_in_messagepack_and_base64_in_json(stage: Stage, log: Log) -> None:
    content = Binary(media_type="audio/pcm", data=b"\x00\xff\x10")
    await log.append(Delta(generation="g1", seq=0, binary=content))
    found = []
    for subprotocol in (MSGPACK, JSON):
        async with socket(stage.url, subprotocol) as client:
            await client.say("subscribe", session="s", from_="start")
            found.append((await client.gather("s", 1))[0]["binary"]["data"])
    assert found == [b"\x00\xff\x10", "AP8Q"]


async def test_an_event_that_messagepack_cannot_encode_is_sent_as_stored_json(stage: Stage, log: Log) -> None:
    stored = b'{"type":"delta","generation":"g1","seq":0,"text":"a","huge":123456789012345678901234567890}'
    await log.append_bytes("g1", stored)
    async with socket(stage.url, MSGPACK) as client:
        await client.say("subscribe", session="s", from_="start")
        assert await client.gather("s", 1) == [stored]


async def test_resume_at_every_cursor_continues_at_the_next_event(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1")
        await client.hear("end")
        cursors = client.cursors["s"]
        for position, cursor in enumerate(cursors, 1):
            client.events.clear()
            client.cursors.clear()
            await client.say("subscribe", session="s", generation="g1", after=cursor)
            await client.hear("end")
            assert keys(client.events.get("s", [])) == keys(events[position:])


async def test_cursor_of_server_sent_events_is_valid_for_a_socket(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    reader = stage.events(generation="g1")
    await reader.read_all()
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1", after=reader.ids[4])
        await client.hear("end")
    assert keys(client.events["s"]) == keys(events[5:])
    assert client.cursors["s"] == reader.ids[5:]


async def test_subscribed_has_the_cursor_before_the_first_event(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        position = (await client.ask("subscribe", id=1, session="s", from_="live"))["cursor"]
        await log.append(*story("g2"))
        await client.gather("s", 13)
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", after=position)
        assert keys(await client.gather("s", 13)) == keys(story("g2"))


async def test_several_sessions_share_a_socket_and_each_keeps_its_order(stage: Stage, log: Log, broker: Broker) -> None:
    sessions = [f"s{n}" for n in range(5)]
    async with socket(stage.url) as client:
        for session in sessions:
            await client.say("subscribe", id=session, session=session, from_="start")
        await asyncio.gather(*(Log(broker, session).append(*story("g1", 40)) for session in sessions))
        for session in sessions:
            assert keys(await client.gather(session, 43)) == keys(story("g1", 40))


async def test_replies_are_sent_while_several_sessions_stream(stage: Stage, broker: Broker) -> None:
    async with socket(stage.url) as client:
        for n in range(3):
            await client.say("subscribe", session=f"s{n}", from_="start")
            await Log(broker, f"s{n}").append(*story("g1", 200, size=2_000))
        assert await client.ask("ping", id="here?") == {"type": "pong", "id": "here?"}
        for n in range(3):
            assert keys(await client.gather(f"s{n}", 203)) == keys(story("g1", 200))


async def test_session_is_subscribed_once_until_it_is_unsubscribed(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", from_="live")
        again = await client.ask("subscribe", id=2, session="s")
        assert (again["type"], again["problem"]["status"]) == ("error", 409)
        await client.say("unsubscribe", session="s")
        assert (await client.hear("end"))["reason"] == "unsubscribed"
        await client.say("subscribe", session="s", from_="start")
        assert len(await client.gather("s", 13)) == 13


async def test_subscription_that_is_unsubscribed_at_once_ends(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", from_="live")
        await client.say("unsubscribe", session="s")
        assert (await client.hear("end"))["reason"] == "unsubscribed"


async def test_credit_in_events_is_never_exceeded(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", credit={"events": 3})
        await client.gather("s", 3)
        await client.ask("ping", id=2)
        assert len(client.events["s"]) == 3
        await client.say("credit", session="s", events=4)
        await client.gather("s", 7)
        await client.ask("ping", id=3)
        assert len(client.events["s"]) == 7
        await client.say("credit", session="s", events=100)
        await client.hear("end")
    assert keys(client.events["s"]) == keys(story("g1"))


async def test_credit_in_bytes_stops_with_the_event_that_uses_it_up(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 20, size=1_000))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", credit={"bytes": 2_500})
        await client.ask("ping", id=2)
        await eventually(lambda: len(client.events.get("s", [])) >= 3)
        await client.ask("ping", id=3)
        assert len(client.events["s"]) == 4  # started, and three of a thousand and something
        await client.say("credit", session="s", bytes=1_000_000)
        await client.hear("end")
    assert keys(client.events["s"]) == keys(story("g1", 20))


async def test_acknowledgements_return_credit(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 50))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", credit={"events": 5})
        while (message := await client.hear())["type"] == "events":
            assert len(message["events"]) <= 5
            await client.say("ack", session="s", cursor=message["events"][-1]["cursor"])
        assert message["type"] == "end"
    assert keys(client.events["s"]) == keys(story("g1", 50))


async def test_credit_limits_live_events(stage: Stage, log: Log) -> None:
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", from_="start", credit={"events": 2})
        await log.append(*story("g1"))
        await client.gather("s", 2)
        await client.ask("ping", id=2)
        assert len(client.events["s"]) == 2
        await client.say("credit", session="s", events=11)
        assert keys(await client.gather("s", 13)) == keys(story("g1"))


async def test_credit_granted_before_the_subscription_is_confirmed_counts(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1", credit={"events": 1})
        await client.say("credit", session="s", events=12)
        await client.hear("end")
    assert len(client.events["s"]) == 13


@pytest.mark.parametrize("subprotocol", [JSON, MSGPACK])
async def test_automatic_window_waits_for_acknowledgements(
    broker: Broker, nats_server: NatsServer, log: Log, subprotocol: str
) -> None:
    events = story("g1", 300, size=2_000)
    await log.append(*events)
    async with delivering(nats_server.url) as stage, socket(stage.url, subprotocol) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", window="auto")
        await client.ask("ping", id=2)
        first = len(client.events["s"])
        assert 0 < first * 2_000 <= 64 * 1024 + 4_000
        await client.say("ack", session="s", cursor=client.cursors["s"][-1])
        while (message := await client.hear())["type"] == "events":
            await client.say("ack", session="s", cursor=message["events"][-1]["cursor"])
        assert message["type"] == "end"
    assert keys(client.events["s"]) == keys(events)


async def test_automatic_window_serves_a_session_that_is_read_from_the_log(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    events = story("g1", 200, size=2_000)
    await log.append(*events)
    async with delivering(nats_server.url, feed_bytes=65_536) as stage, socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", from_="start", window="auto")
        while len(client.events.get("s", [])) < len(events):
            message = await client.hear("events")
            await client.say("ack", session="s", cursor=message["events"][-1]["cursor"])
    assert keys(client.events["s"]) == keys(events)


@pytest.mark.parametrize("wish", [{"granularity": "sentence"}, {"granularity": "line"}, {"coalesce": 100}])
async def test_pieces_of_text_are_acknowledged_where_they_end(
    stage: Stage, log: Log, wish: dict[str, str | int]
) -> None:
    words = "One sentence. And the next one! A third\nand a line. " * 20
    pieces = [words[at : at + 7] for at in range(0, len(words), 7)]
    started, *_, usage, completed = story("g1", len(pieces))
    deltas = [Delta(generation="g1", seq=seq, text=piece, tokens=seq) for seq, piece in enumerate(pieces, 1)]
    await log.append(started, *deltas, usage, completed)
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", credit={"events": 1}, **wish)
        while (message := await client.hear())["type"] == "events":
            assert len(message["events"]) == 1
            await client.say("ack", session="s", cursor=message["events"][-1]["cursor"])
        assert message["type"] == "end"
    events = client.events["s"]
    assert "".join(event.get("text", "") for event in events) == words
    assert len(events) < len(pieces)
    assert client.cursors["s"] == sorted(set(client.cursors["s"]))


async def test_credit_without_a_credit_window_is_refused(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", from_="live")
        assert (await client.ask("credit", id=2, session="s", events=1))["problem"]["status"] == 409
        both = await client.ask("subscribe", id=3, session="t", credit={"events": 1}, window="auto")
        assert both["problem"]["status"] == 400


async def test_messages_after_the_end_of_a_subscription_are_errors_only_when_they_have_an_id(
    stage: Stage, log: Log
) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1")
        await client.hear("end")
        await client.say("ack", session="s", cursor=client.cursors["s"][-1])
        await client.say("credit", session="s", events=1)
        await client.say("unsubscribe", session="s")
        await client.say("ping", id=1)
        assert await client.hear() == {"type": "pong", "id": 1}
        assert (await client.ask("unsubscribe", id=2, session="s"))["problem"]["status"] == 404


async def test_cursor_that_was_not_sent_yet_is_no_acknowledgement(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    whole = stage.events(generation="g1")
    await whole.read_all()
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", generation="g1", credit={"events": 2})
        await client.gather("s", 2)
        assert (await client.ask("ack", id=2, session="s", cursor=whole.ids[6]))["problem"]["status"] == 409
        wrong = await client.ask("ack", id=3, session="s", cursor="t1")
        assert wrong["problem"]["type"].endswith("cursor-invalid")


async def test_start_is_queued_once_for_its_key_and_read_after_its_cursor(stage: Stage, log: Log) -> None:
    async with socket(stage.url) as client:
        first = await client.ask("start", id="a", session="s", request=BODY, idempotency_key="k")
        assert (first["type"], first["state"]) == ("accepted", "queued")
        again = await client.ask("start", id="b", session="s", request=BODY, idempotency_key="k")
        assert (again["generation"], again["repeated"]) == (first["generation"], True)
        other = await client.ask("start", id="c", session="s", request=BODY | {"model": "x/y"}, idempotency_key="k")
        assert other["problem"]["type"].endswith("idempotency-conflict")
        await client.ask("subscribe", id="d", session="s", generation=first["generation"], after=first["cursor"])
        await log.append(*story(first["generation"]))
        await client.hear("end")
    assert keys(client.events["s"]) == keys(story(first["generation"]))
    found = (await stage.http.get(f"{stage.url}/v1/sessions/s")).json()
    assert [record["generation"] for record in found["generations"]] == [first["generation"]]


async def test_start_over_messagepack_takes_the_same_body(stage: Stage) -> None:
    async with socket(stage.url, MSGPACK) as client:
        answer = await client.ask("start", id=1, session="s", request=BODY)
        assert answer["type"] == "accepted"
        odd = await client.ask(
            "start", id=2, session="s", request=BODY | {"params": {"a": msgspec.msgpack.Ext(5, b"")}}
        )
        assert odd["problem"]["status"] == 400


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "model"),
        (BODY | {"messages": []}, "messages"),
        (BODY | {"colour": "red"}, "colour"),
        (BODY | {"model": "scripted/story\n"}, "U+000A"),
        ([], "object"),
        (None, "object"),
    ],
)
async def test_invalid_start_gets_a_problem_with_the_reason(stage: Stage, request_: object, said: str) -> None:
    async with socket(stage.url) as client:
        answer = await client.ask("start", id=1, session="s", request=request_)
        assert answer["problem"]["status"] == 400
        assert said in answer["problem"]["detail"]


async def test_cancel_answers_with_the_state(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        answer = await client.ask("cancel", id=1, session="s", generation="g1")
        assert (answer["type"], answer["state"]) == ("cancelling", "completed")
        unknown = await client.ask("cancel", id=2, session="s", generation="g9")
        assert unknown["problem"]["status"] == 404


async def test_expired_beginning_is_one_gap_per_generation(stage: Stage, log: Log) -> None:
    await log.append(*story("g1")[5:])
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1")
        gap = await client.hear("gap")
        assert gap == {"type": "gap", "session": "s", "reason": "beginning_expired", "generation": "g1"}
        await client.hear("end")
    assert keys(client.events["s"]) == keys(story("g1")[5:])


async def test_recreated_log_ends_the_subscription(stage: Stage, log: Log, broker: Broker) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", from_="start")
        await client.gather("s", 13)
        await broker.js.delete_stream("TOKENS_0")
        await broker.apply(stage_topology())
        assert (await client.hear("gap"))["reason"] == "log_recreated"
        assert (await client.hear("end"))["reason"] == "gap"
        assert (await client.ask("ping", id=1))["type"] == "pong"


def stage_topology():  # type: ignore[no-untyped-def]
    from schemas.topology import Topology

    return Topology()


async def test_invalid_read_options_are_problems_of_their_subscription(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        for wish, status, slug in [
            ({"session": "no such name!"}, 400, "bad-request"),
            ({"session": "s", "generation": "g9"}, 404, "not-found"),
            ({"session": "s", "after": "t1nonsense"}, 400, "cursor-invalid"),
            ({"session": "s", "from_": "yesterday"}, 400, "bad-request"),
            ({"session": "s", "after": "t1" + "0" * 30}, 400, "cursor-invalid"),
        ]:
            answer = await client.ask("subscribe", id=1, **wish)
            assert (answer["type"], answer["problem"]["status"]) == ("error", status), wish
            assert answer["problem"]["type"].endswith(slug)
        await client.ask("subscribe", id=2, session="s", from_="start")
        assert len(await client.gather("s", 13)) == 13


async def test_unknown_subprotocol_is_refused_with_the_supported_ones(stage: Stage) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with socket(stage.url, "tailrace.v9.json"):
            pass
    assert refused.value.response.status_code == 400
    problem = json.loads(refused.value.response.body)
    assert problem["type"].endswith("unknown-subprotocol")
    assert JSON in problem["detail"]


async def test_request_without_upgrade_is_426(stage: Stage) -> None:
    answer = await stage.http.get(f"{stage.url}/v1/ws")
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    assert answer.json()["type"].endswith("upgrade-required")


async def test_drain_sends_bye_with_a_cursor_and_closes_the_socket(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1")[:5])
    async with delivering(nats_server.url) as stage, socket(stage.url) as client, socket(stage.url) as idle:
        await client.say("subscribe", session="s", from_="start")
        await client.gather("s", 5)
        await stage.replica.drain(10)
        bye = await client.hear("bye")
        assert (bye["session"], bye["reason"], bye["cursor"]) == ("s", "drain", client.cursors["s"][-1])
        assert (await client.closed())[0] == 1001
        assert (await idle.closed())[0] == 1001
    assert metric("tailrace_delivery_sockets") == 0


async def test_lifetime_ends_the_socket_with_bye_for_every_subscription(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1")[:5])
    async with delivering(nats_server.url, lifetime=1.0) as stage, socket(stage.url) as client:
        await client.say("subscribe", session="s", from_="start")
        bye = await client.hear("bye")
        assert bye["cursor"] == client.cursors["s"][-1]
        assert (await client.closed())[0] == 1001


async def test_client_that_answers_no_ping_is_closed(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, heartbeat=0.3) as stage:
        async with socket(stage.url) as client:
            client.pongs = False
            assert (await client.closed())[0] == 4408
            assert client.pings
        async with socket(stage.url) as client:
            for _ in range(3):
                await client.hear("ping")
            assert (await client.ask("ping", id=1))["type"] == "pong"


async def test_client_that_vanishes_is_noticed(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s", from_="start")
        assert open_subscriptions() == 1
        client.connection.transport.abort()
        await eventually(lambda: open_subscriptions() == 0)


async def test_stalled_client_is_evicted_and_others_are_not(broker: Broker, nats_server: NatsServer, log: Log) -> None:
    events = story("g1", 250, size=64_000)
    async with delivering(nats_server.url, stall=1.0, feed_bytes=65_536) as stage:
        async with socket(stage.url) as fast, socket(stage.url, max_queue=1) as stuck:
            for client in (fast, stuck):
                await client.say("subscribe", session="s", from_="start")
            stuck.connection.transport.pause_reading()
            before = metric("tailrace_delivery_sockets_closed_total", reason="evicted")
            appending = asyncio.create_task(log.append(*events))
            assert keys(await fast.gather("s", len(events))) == keys(events)
            await appending
            await eventually(lambda: metric("tailrace_delivery_sockets_closed_total", reason="evicted") == before + 1)
            stuck.connection.transport.resume_reading()
            assert len((await drained(stuck)).events["s"]) < len(events)
        await eventually(lambda: open_subscriptions() == 0)


async def drained(client: SocketClient) -> SocketClient:
    """Read the remaining messages of a client until its connection is closed or lost."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await client.hear()
    return client


async def test_message_that_is_too_large_closes_the_socket(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, max_body=4_096) as stage, socket(stage.url) as client:
        await client.say("start", session="s", request=BODY | {"metadata": {"a": "x" * 5_000}})
        code, reason = await client.closed()
        assert code == 1009
        assert "4096 bytes: TAILRACE_DELIVERY_MAX_BODY" in reason


async def test_number_of_subscriptions_is_bounded(stage: Stage) -> None:
    async with socket(stage.url) as client:
        for n in range(64):
            await client.say("subscribe", session=f"s{n}", from_="live")
        answer = await client.ask("subscribe", id="one more", session="more")
        assert answer["problem"]["type"].endswith("too-many-subscriptions")


async def test_client_that_sends_too_fast_is_throttled_and_loses_no_message(stage: Stage) -> None:
    before = metric("tailrace_delivery_socket_throttled_total")
    said = [json.dumps({"type": "wrong", "id": n}).encode() for n in range(60)]
    async with socket(stage.url) as client:
        at_once = b"".join(bytes([0x81, 0x80 | len(data)]) + b"\0\0\0\0" + data for data in said)
        client.connection.transport.write(at_once)
        assert [(await client.hear("error"))["id"] for _ in said] == list(range(60))
    assert metric("tailrace_delivery_socket_throttled_total") > before


async def test_events_are_framed_once_for_all_sockets_of_a_session(stage: Stage, log: Log) -> None:
    clients: list[SocketClient] = []
    async with socket(stage.url) as one, socket(stage.url) as two:
        clients = [one, two]
        for client in clients:
            await client.ask("subscribe", id=1, session="s", from_="start")
        feed = await stage.replica.feeds.feed("default", "s")
        assert len({id(subscriber.format) for subscriber in feed.subscribers}) == 1
        await log.append(*story("g1"))
        for client in clients:
            assert keys(await client.gather("s", 13)) == keys(story("g1"))


async def test_http_is_served_beside_sockets(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with socket(stage.url) as client, httpx.AsyncClient() as http:
        await client.say("subscribe", session="s", from_="start")
        await client.gather("s", 13)
        assert (await http.get(f"{stage.url}/healthz")).status_code == 200
