"""Test mutated transcripts: no input causes an exception, a hang, a false success, or an undecodable part."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.producer.core.dialects import Parser
from services.producer.core.parts import Alive, End, NoticePart, Part, Text, UpstreamFailure
from tests.support.provider_transcripts import TRANSCRIPTS, Transcript

DIALECTS = ("openai", "openrouter", "anthropic", "cohere")
SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ERRORS: list[dict[str, Any]] = [
    {"error": {"message": "boom", "type": "server_error", "code": 500}},
    {"error": "boom"},
    {"object": "error", "message": "boom", "code": 400},
    {"type": "error", "error": {"type": "overloaded_error", "message": "boom"}},
    {"base_resp": {"status_code": 1008, "status_msg": "boom"}, "choices": None},
    {"detail": "boom"},
    {"errors": [{"message": "boom"}]},
    {"message": "boom"},
]
FINISHED = [t for t in TRANSCRIPTS if not any(p["part"] == "UpstreamFailure" for p in t.expected)]


def everything(parser: Parser, chunks: list[bytes]) -> list[Part]:
    """Return all parts of a body, after checking the invariants of each."""
    parts: list[Part] = []
    for chunk in chunks:
        parts += parser.feed(chunk)
    parts += parser.finish()
    endings = [at for at, part in enumerate(parts) if isinstance(part, End | UpstreamFailure)]
    assert endings == [len(parts) - 1], "exactly one ending, as the last part"
    for part in parts:
        assert msgspec.json.decode(msgspec.json.encode(part), type=type(part)) is not None
        if isinstance(part, NoticePart | UpstreamFailure):
            assert 0 < len(part.message) <= 500
    assert parser.feed(b"data: {}\n\n") == parser.finish() == []
    return parts


def cut(wire: bytes, data: st.DataObject) -> list[bytes]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=6)))
    return [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
    | st.sampled_from(["error", "[DONE]", "\ud83d", "\ude00", "stop", "message", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "content", "delta", "index", "choices", "usage", "type", "text", "code"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def mutated(value: Any, data: st.DataObject) -> Any:
    """Return ``value`` with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        name = data.draw(st.sampled_from(sorted(value)))
        match data.draw(st.sampled_from(["into", "into", "into", "remove", "add"])):
            case "remove":
                return {key: item for key, item in value.items() if key != name}
            case "add":
                return {**value, data.draw(st.sampled_from(["error", "message", "text", "type"])): data.draw(VALUES)}
        return {**value, name: mutated(value[name], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], mutated(value[at], data), *value[at + 1 :]]
    return data.draw(VALUES)


@SETTINGS
@given(data=st.data())
def test_mutated_fields(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    events = transcript.wire.replace(b"\r\n", b"\n").split(b"\n\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(events) - 1))
        head, sep, payload = events[at].partition(b"data: ")
        try:
            value = mutated(json.loads(payload), data)
        except ValueError:
            continue
        events[at] = head + sep + json.dumps(value).encode()
    everything(transcript.parser(), cut(b"\n\n".join(events), data))


@SETTINGS
@given(data=st.data())
def test_mutated_bytes(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    wire = bytearray(transcript.wire)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, max(0, len(wire) - 1)))
        match data.draw(st.sampled_from(["flip", "drop", "insert", "repeat", "truncate"])):
            case "flip":
                wire[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "drop":
                del wire[at : at + data.draw(st.integers(1, 60))]
            case "insert":
                tokens = [
                    b"\n",
                    b"\n\n",
                    b"data: ",
                    b"event: error\n",
                    b"{",
                    b"}",
                    b"[DONE]",
                    b"null",
                    b"NaN",
                    b"\\ud83d",
                ]
                wire[at:at] = data.draw(st.sampled_from(tokens) | st.binary(max_size=8))
            case "repeat":
                wire[at:at] = wire[at : at + data.draw(st.integers(1, 200))]
            case "truncate":
                del wire[at:]
    everything(transcript.parser(), cut(bytes(wire), data))


@SETTINGS
@given(data=st.data())
def test_events_in_another_order(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    events = [event for event in transcript.wire.replace(b"\r\n", b"\n").split(b"\n\n") if event]
    chosen = data.draw(st.lists(st.sampled_from(events), max_size=20))
    everything(transcript.parser(), cut(b"\n\n".join(chosen) + b"\n\n", data))


@SETTINGS
@given(data=st.data())
def test_json_of_any_shape(data: st.DataObject) -> None:
    parser = Transcript(data.draw(st.sampled_from(DIALECTS)), "text").parser()
    documents = [json.dumps(data.draw(VALUES)).encode() for _ in range(data.draw(st.integers(1, 4)))]
    framing = data.draw(st.sampled_from([b"data: %s\n\n", b"%s\n", b"%s", b"event: x\ndata: %s\n\n", b"error: %s\n\n"]))
    parts = everything(parser, cut(b"".join(framing % document for document in documents), data))
    if framing == b"error: %s\n\n":
        assert isinstance(parts[-1], UpstreamFailure)


@SETTINGS
@given(data=st.data())
def test_an_error_ahead_of_the_end_marker_never_becomes_a_success(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(FINISHED))
    events = [event for event in transcript.wire.replace(b"\r\n", b"\n").split(b"\n\n") if event]
    error = json.dumps(data.draw(st.sampled_from(ERRORS)), indent=data.draw(st.sampled_from([None, 2])))
    framings = ["event: error\ndata: {}", "error: {}", "{}"] + (["data: {}"] if "\n" not in error else [])
    framed = data.draw(st.sampled_from(framings)).replace("{}", error).encode()
    if framed.startswith((b"event: error\ndata: ", b"error: ")):
        framed = framed.replace(b"\n ", b" ").replace(b"\n}", b"}")
    at = data.draw(st.integers(0, len(events) - 1))
    wire = b"\n\n".join([*events[:at], framed, *events[at:]]) + b"\n\n"
    parts = everything(transcript.parser(), cut(wire, data))
    assert isinstance(parts[-1], UpstreamFailure)
    assert "boom" in parts[-1].message


@SETTINGS
@given(data=st.data())
def test_a_stream_that_stops_before_its_finish_reason_is_never_a_success(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(FINISHED))
    wire = transcript.wire
    last = max(wire.rfind(word) for word in (b'"finish_reason":"', b'"stop_reason":"', b"message-end"))
    parts = everything(transcript.parser(), cut(wire[: data.draw(st.integers(0, last))], data))
    assert isinstance(parts[-1], UpstreamFailure)


@SETTINGS
@given(data=st.data())
def test_inserted_garbage_has_the_same_result_under_every_chunking(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    events = transcript.wire.replace(b"\r\n", b"\n").split(b"\n\n")
    odd = st.sampled_from(
        [b"data: null", b"{}", b"no event", b'data: {"foo": 1}', b'data: {"choices":[{"index":null}]}', b""]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        events.insert(data.draw(st.integers(0, len(events))), data.draw(odd))
    wire = b"\n\n".join(events)

    def meaning(chunks: list[bytes]) -> tuple[object, ...]:
        parts = everything(transcript.parser(), chunks)
        text = "".join(part.text for part in parts if isinstance(part, Text))
        return text, parts[-1], {part for part in parts if isinstance(part, NoticePart)}

    assert meaning([wire]) == meaning(cut(wire, data))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "wire",
    [
        b"[" * 1_000_000,
        b"{" * 1_000_000,
        b'{"a":' * 200_000,
        b"data: " + b'{"a":' * 200_000 + b"\n\n",
        b"x\n" * 500_000,
        b"\n" * 1_000_000,
        b"{}\n" * 100_000,
        b"}\n{" * 300_000,
        b"data\n\n" * 200_000,
        b"error\n" * 100_000,
        b'{"content":"' + b"\\ud83d" * 200_000 + b'"}',
        b"data: {\n" * 100_000,
        b"[" + b"{}," * 200_000 + b"{}]",
    ],
    ids=lambda wire: repr(wire[:12]),
)
def test_hostile_bodies_take_little_time(dialect: str, wire: bytes) -> None:
    begun = time.process_time()
    parser = Transcript(dialect, "text").parser()
    parts = [part for at in range(0, len(wire), 65_536) for part in parser.feed(wire[at : at + 65_536])]
    parts += parser.finish()
    assert time.process_time() - begun < 10
    assert isinstance(parts[-1], UpstreamFailure)
    assert len([part for part in parts if not isinstance(part, Alive)]) < 10
