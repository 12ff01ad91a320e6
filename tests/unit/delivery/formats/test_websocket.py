"""Events framed for a WebSocket."""

import gc
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.cursor import CursorIssuer
from services.delivery.formats.format import Address
from services.delivery.formats.tail import Entry
from services.delivery.formats.websocket import Formats, SessionFormat, position_of
from services.delivery.formats.websocket_messages import JSON, MSGPACK, Dialect

PREFIX = CursorIssuer(0, "2026-01-01T00:00:00Z", "t", "s").prefix
AT = Address("s", PREFIX.encode())
DATA = '{"type":"delta","generation":"g","seq":1,"text":"\\u2028 é"}'.encode()


def entry(seq: int, data: bytes = DATA, offset: int = 0) -> Entry:
    return Entry(seq, "g", "delta", data, offset)


def decoded(format_: SessionFormat, frames: list[bytes]) -> list[dict[str, object]]:
    found = []
    for message in format_.message(frames, ends=False).messages:
        assert message["type"] == "websocket.send"
        text = message.get("text")
        found.append(msgspec.msgpack.decode(message["bytes"]) if text is None else json.loads(text))
    return found


@pytest.mark.parametrize("name", [JSON, MSGPACK])
def test_events_of_a_write_travel_in_one_message(name: str) -> None:
    format_ = SessionFormat("s", Dialect(name))
    frames = [format_.frame(entry(seq), AT) for seq in (3, 9)]
    event = {"type": "delta", "generation": "g", "seq": 1, "text": "\u2028 é"}
    assert decoded(format_, frames) == [
        {
            "type": "events",
            "session": "s",
            "events": [{"cursor": f"{PREFIX}{seq:012x}", "event": event} for seq in (3, 9)],
        }
    ]


@pytest.mark.parametrize("name", [JSON, MSGPACK])
def test_gap_and_bye_are_separate_messages_in_order(name: str) -> None:
    format_ = SessionFormat("s", Dialect(name))
    frames = [
        format_.frame(entry(1), AT),
        format_.gap("beginning_expired", "g2", AT),
        format_.frame(entry(2), AT),
        format_.bye("drain", 2, AT),
    ]
    found = decoded(format_, frames)
    assert [message["type"] for message in found] == ["events", "gap", "events", "bye"]
    assert found[1] == {"type": "gap", "session": "s", "reason": "beginning_expired", "generation": "g2"}
    assert found[3] == {"type": "bye", "session": "s", "reason": "drain", "cursor": f"{PREFIX}{2:012x}"}
    outgoing = format_.message(frames, ends=True)
    assert (outgoing.events, outgoing.size) == (2, len(frames[0]) + len(frames[2]))
    assert outgoing.position == position_of(f"{PREFIX}{2:012x}")


@pytest.mark.parametrize("name", [JSON, MSGPACK])
@given(places=st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**30)), min_size=1, max_size=5))
def test_position_of_a_write_is_that_of_its_last_cursor(name: str, places: list[tuple[int, int]]) -> None:
    format_ = SessionFormat("s", Dialect(name))
    frames = [format_.frame(entry(seq, offset=offset), AT) for seq, offset in places]
    last = AT.after(entry(places[-1][0], offset=places[-1][1])).decode()
    assert format_.message(frames, ends=False).position == position_of(last)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**30)), min_size=2, max_size=2))
def test_positions_order_like_cursors(places: list[tuple[int, int]]) -> None:
    one, two = (AT.after(entry(seq, offset=offset)).decode() for seq, offset in places)
    assert (position_of(one) < position_of(two)) == (one < two)


def test_write_without_events_has_no_position() -> None:
    format_ = SessionFormat("s", Dialect(JSON))
    outgoing = format_.message([format_.gap("log_recreated", None, AT)], ends=True)
    assert (outgoing.events, outgoing.size, outgoing.position) == (0, 0, 0)


def test_bytes_that_are_no_utf8_do_not_break_a_text_frame() -> None:
    format_ = SessionFormat("s", Dialect(JSON))
    frame = format_.frame(entry(1, b'{"type":"delta","generation":"g","seq":1,"x":"\xff"}'), AT)
    assert decoded(format_, [frame])[0]["type"] == "events"


def test_session_has_one_format_as_long_as_it_is_in_use() -> None:
    formats = Formats(Dialect(JSON))
    first = formats.of("s")
    assert formats.of("s") is first
    assert formats.of("t") is not first
    del first
    gc.collect()
    assert not formats._formats
