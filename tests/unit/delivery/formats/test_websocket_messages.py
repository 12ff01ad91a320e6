"""Test the decoding of clients' WebSocket messages: each is decoded or refused with a reason, without an exception."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.delivery.formats.websocket_messages import (
    JSON,
    MSGPACK,
    Ack,
    Credit,
    CreditBody,
    Dialect,
    Pong,
    Subscribe,
    Unreadable,
)

DIALECTS = {JSON: Dialect(JSON), MSGPACK: Dialect(MSGPACK)}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
TYPES = st.sampled_from(["subscribe", "credit", "ack", "unsubscribe", "start", "cancel", "ping", "pong", "x", ""])
FIELDS = st.sampled_from(["id", "session", "generation", "after", "from", "credit", "window", "cursor", "request", "z"])


def packed(dialect: Dialect, message: object) -> str | bytes:
    return json.dumps(message) if dialect.text else msgspec.msgpack.encode(message)


@pytest.mark.parametrize("name", [JSON, MSGPACK])
def test_messages_are_decoded_in_either_encoding(name: str) -> None:
    dialect = DIALECTS[name]

    def read(**message: object) -> object:
        return dialect.decode(packed(dialect, message))

    assert read(type="subscribe", session="s", **{"from": "start"}) == Subscribe(session="s", from_="start")
    assert read(type="subscribe", session="s", credit={"events": 3}, id=7) == Subscribe(
        id=7, session="s", credit=CreditBody(events=3)
    )
    assert read(type="credit", session="s", bytes=4_096) == Credit(session="s", bytes=4_096)
    assert read(type="ack", session="s", cursor="t1") == Ack(session="s", cursor="t1")
    assert read(type="pong", id=2) == Pong(id=2)


@pytest.mark.parametrize(
    ("message", "slug", "said"),
    [
        ({"type": "subscribe"}, "bad-message", "session"),
        ({"type": "subscribe", "session": 5}, "bad-message", "$.session"),
        ({"type": "subscribe", "session": "s", "credit": {"events": 0}}, "bad-message", "events"),
        ({"type": "subscribe", "session": "s", "window": "big"}, "bad-message", "window"),
        ({"type": "subscribe", "session": "s", "colour": 1}, "bad-message", "colour"),
        ({"type": "credit", "session": "s", "events": -1}, "bad-message", "events"),
        ({"type": "dance", "id": 1}, "unknown-type", "subscribe, credit, ack"),
        ({"session": "s"}, "unknown-type", "None"),
        ([1, 2], "unreadable-message", "object"),
        (None, "unreadable-message", "object"),
        ("subscribe", "unreadable-message", "object"),
    ],
)
@pytest.mark.parametrize("name", [JSON, MSGPACK])
def test_invalid_message_is_unreadable_with_slug_and_detail(name: str, message: object, slug: str, said: str) -> None:
    dialect = DIALECTS[name]
    found = dialect.decode(packed(dialect, message))
    assert isinstance(found, Unreadable)
    assert found.slug == slug
    assert said in found.detail


def test_wrong_message_is_answered_under_its_own_id() -> None:
    assert DIALECTS[JSON].decode('{"type":"ack","id":"mine"}').id == "mine"
    assert DIALECTS[JSON].decode('{"type":"ack","id":{"no":"name"}}').id is None
    assert DIALECTS[JSON].decode('{"type":"ack","id":true}').id is None
    assert DIALECTS[JSON].decode('{"type":"ack","id":"' + "x" * 5_000 + '"}').id is None


def test_frames_of_the_other_kind_are_refused() -> None:
    assert DIALECTS[JSON].decode(b'{"type":"ping"}').slug == "wrong-frame"
    assert DIALECTS[MSGPACK].decode('{"type":"ping"}').slug == "wrong-frame"


@pytest.mark.parametrize(
    "data", ["", "{", "\ud800", '{"type":"ping"}{', "[" * 100_000, '{"a":' * 50_000, "nul", "1e999"]
)
def test_text_that_is_no_json_is_unreadable(data: str) -> None:
    assert isinstance(DIALECTS[JSON].decode(data), Unreadable)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_are_read_or_refused(data: str | bytes) -> None:
    for dialect in DIALECTS.values():
        dialect.decode(data)


@given(TYPES, st.dictionaries(FIELDS, VALUES, max_size=6))
def test_any_fields_are_read_or_refused(type_: str, fields: dict[str, object]) -> None:
    for dialect in DIALECTS.values():
        found = dialect.decode(packed(dialect, fields | {"type": type_}))
        if isinstance(found, Unreadable):
            assert found.slug in ("bad-message", "unknown-type")
            dialect.encode(Pong(id=found.id))
