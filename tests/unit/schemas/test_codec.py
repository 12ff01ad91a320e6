"""Test the encoding and decoding of events, and bytes that are no events."""

import base64
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.codec import MalformedEvent, UnknownEvent, decode_event, decode_header, encode_event
from schemas.events import (
    TERMINAL_TYPES,
    VERSION,
    Binary,
    Completed,
    Delta,
    Event,
    Failed,
    Notice,
    Started,
    ToolCall,
    UsageReported,
    is_terminal,
)
from schemas.usage import MAX_NUMBER, Usage
from tests.support.struct_strategies import EVENTS, JSON, TEXT, any_event

HEAD = {"generation": "gen_1", "seq": 3}


def stored(**fields: Any) -> bytes:
    return json.dumps({**HEAD, **fields}).encode()


@settings(deadline=None)
@given(any_event())
def test_every_event_round_trips(event: Event) -> None:
    assert decode_event(encode_event(event)) == event


@settings(deadline=None)
@given(any_event())
def test_encoding_again_gives_the_same_bytes(event: Event) -> None:
    data = encode_event(event)
    assert encode_event(decode_event(data)) == data


@settings(deadline=None)
@given(any_event())
def test_the_header_agrees_with_the_event(event: Event) -> None:
    header = decode_header(encode_event(event))
    assert (header.generation, header.seq, header.epoch) == (event.generation, event.seq, event.epoch)
    assert header.type == event.__struct_config__.tag
    assert header.tokens == (event.tokens if isinstance(event, Delta) else 0)
    assert (header.type in TERMINAL_TYPES) == is_terminal(event)


@settings(deadline=None)
@given(any_event(), st.dictionaries(TEXT.map(lambda name: f"later_{name}"), JSON, max_size=4))
def test_fields_of_a_later_version_are_ignored(event: Event, later: dict[str, Any]) -> None:
    data = json.dumps({**json.loads(encode_event(event)), **later}).encode()
    assert decode_event(data) == event


@given(TEXT.filter(lambda t: t not in {c.__struct_config__.tag for c in EVENTS}), st.integers(0, MAX_NUMBER))
def test_an_unknown_type_raises_unknown_event_with_its_header(type_: str, seq: int) -> None:
    with pytest.raises(UnknownEvent) as caught:
        decode_event(stored(type=type_, seq=seq, epoch=2, payload=[1]))
    assert caught.value.type == type_
    assert caught.value.header == decode_header(stored(type=type_, seq=seq, epoch=2))


@settings(deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b'{"a":' * 100_000)
@example(b"[" * 100_000)
@example(b'{"type":"\xff"}')
@example(b'{"generation":"\xff\xfe","seq":0,"type":"delta"}')
@example(stored(type="delta", text="?").replace(b"?", b"\\ud800"))
@example(b'{"generation":"g","seq":' + b"9" * 5_000 + b',"type":"delta"}')
@example(b'{"generation":"g","seq":0,"type":"usage","usage":{"raw":{"a":' + b"[" * 100_000)
def test_bytes_that_are_no_event_are_malformed_and_nothing_else(data: bytes) -> None:
    for decode in (decode_event, decode_header):
        with pytest.raises(MalformedEvent):
            decode(data)


@settings(deadline=None, max_examples=400)
@given(any_event(), st.data())
def test_a_damaged_event_is_decoded_or_refused_and_never_another_error(event: Event, data: st.DataObject) -> None:
    good = encode_event(event)
    at = data.draw(st.integers(0, len(good)))
    damaged = good[:at] + data.draw(st.binary(max_size=3)) + good[at + data.draw(st.integers(0, 3)) :]
    try:
        decoded = decode_event(damaged)
    except (MalformedEvent, UnknownEvent):
        return
    assert decode_header(damaged).seq == decoded.seq


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "delta", "seq": -1},
        {"type": "delta", "seq": MAX_NUMBER + 1},
        {"type": "delta", "seq": 1.5},
        {"type": "delta", "seq": True},
        {"type": "delta", "seq": "3"},
        {"type": "delta", "epoch": 0},
        {"type": "delta", "generation": None},
        {"type": "delta", "tokens": -1},
        {"type": 7},
        {},
    ],
)
def test_an_event_with_a_wrong_header_is_malformed_without_one(fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvent) as caught:
        decode_event(stored(**fields))
    assert caught.value.header is None
    with pytest.raises(MalformedEvent):
        decode_header(stored(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "delta", "text": 7},
        {"type": "delta", "choice": -1},
        {"type": "delta", "binary": {"media_type": "image/png", "data": "not base64!"}},
        {"type": "started"},
        {"type": "usage", "usage": {"input": -5}},
        {"type": "usage", "usage": {"output": 10**30}},
        {"type": "failed", "code": None},
    ],
)
def test_a_known_type_with_a_wrong_body_is_malformed_and_keeps_its_header(fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvent) as caught:
        decode_event(stored(**fields))
    assert caught.value.header == decode_header(stored(**fields))


def test_a_duplicate_type_field_is_malformed() -> None:
    with pytest.raises(MalformedEvent):
        decode_event(b'{"type":"delta","type":"started","seq":0,"generation":"g"}')


def test_binary_is_base64_in_json() -> None:
    event = Delta(**HEAD, binary=Binary(media_type="audio/wav", data=b"\x00\xff\xfe"))
    assert json.loads(encode_event(event))["binary"] == {
        "media_type": "audio/wav",
        "data": base64.b64encode(b"\x00\xff\xfe").decode(),
    }


def test_halves_of_a_surrogate_pair_are_joined_or_replaced_and_never_refused() -> None:
    joined = Delta(**HEAD, text="a\ud83d\ude00b")
    assert decode_event(encode_event(joined)) == Delta(**HEAD, text="a😀b")
    lone = Delta(**HEAD, tool_call=ToolCall(index=2, name="\ude00f", arguments="x\ud83d"))
    assert decode_event(encode_event(lone)) == Delta(
        **HEAD, tool_call=ToolCall(index=2, name="\ufffdf", arguments="x\ufffd")
    )


def test_the_first_version_is_not_written_and_an_absent_version_means_the_first() -> None:
    assert VERSION == 1
    assert "v" not in json.loads(encode_event(Delta(**HEAD, text="x")))
    assert decode_event(stored(type="delta")).v == 1


def test_a_known_type_of_a_later_version_is_read_without_its_unknown_fields() -> None:
    event = decode_event(stored(type="delta", v=7, text="x", colour="red"))
    assert event == Delta(**HEAD, v=7, text="x")
    assert json.loads(encode_event(event))["v"] == 7


@pytest.mark.parametrize(
    ("event", "written"),
    [
        (Delta(**HEAD, at=1.5, text="hé", tokens=2), '{"type":"delta","text":"hé","tokens":2,HEAD,"at":1.5}'),
        (Notice(**HEAD, epoch=2, code="retry"), '{"type":"notice","code":"retry",HEAD,"epoch":2}'),
        (
            Started(**HEAD, model="m", provider="p", upstream_model="u"),
            '{"type":"started","model":"m","provider":"p","upstream_model":"u",HEAD}',
        ),
        (
            Delta(**HEAD, tool_call=ToolCall(index=1, id="c", name="f", arguments="{")),
            '{"type":"delta","tool_call":{"index":1,"id":"c","name":"f","arguments":"{"},HEAD}',
        ),
        (
            UsageReported(**HEAD, usage=Usage(input=3, output=2, cost="0.001")),
            '{"type":"usage","usage":{"input":3,"output":2,"cost":"0.001"},HEAD}',
        ),
        (Completed(**HEAD, finish_reason="stop"), '{"type":"completed","finish_reason":"stop",HEAD}'),
        (Failed(**HEAD, code="upstream_error"), '{"type":"failed","code":"upstream_error",HEAD}'),
    ],
)
def test_bytes_on_the_wire_stay_as_they_are(event: Event, written: str) -> None:
    assert encode_event(event).decode() == written.replace("HEAD", '"generation":"gen_1","seq":3')
