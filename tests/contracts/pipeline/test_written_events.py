"""Test that readers accept every event that a producer builds from any provider's stream."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import decode_event, decode_header, encode_event
from schemas.events import Annotation, AnyEvent, Binary, Delta, Extra, Notice, Signature, ToolCall, UsageReported
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from schemas.subjects import Address, token_subject
from schemas.usage import Usage
from services.billing.core.fold import fold
from services.billing.core.intake import read_record
from services.delivery.consumers.judging import read_header
from services.delivery.formats.format import Address as FormatAddress
from services.delivery.formats.granularity import Chunker, Granularity, Position
from services.delivery.formats.protobuf import typed
from services.delivery.formats.tail import Entry
from services.delivery.formats.websocket import msgpack_frame
from services.delivery.requests.transcript import Transcript
from services.producer.core.bounds import CHOICES, EVENT_BYTES, JSON_BYTES, PIECE_BYTES, PIECE_CHARS
from services.producer.core.counting import GenerationCounter
from services.producer.core.generation import Generation
from services.producer.core.parts import (
    Alive,
    AnnotationPart,
    BinaryPart,
    End,
    ExtraPart,
    Finish,
    Identity,
    Omitted,
    Part,
    Reasoning,
    Refusal,
    SignaturePart,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsageBegun,
    UsagePart,
)
from services.producer.core.takeover import Begun
from tests.support.provider_transcripts import TRANSCRIPTS

ADDRESS = Address.of("t", "s", "g", 1)
EDGES = (-1, 2**53 - 1, 2**53, -(2**63), 2**64, 10**30, CHOICES - 1, CHOICES)
NUMBER = st.integers(-3, 9) | st.sampled_from(EDGES) | st.booleans()
TEXT = st.text(max_size=8) | st.sampled_from(["\ud83d", "a\ude00b", "\ud83d\ude00", "\0", "\u2028", "é"])
AT = st.none() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MAYBE = st.none() | TEXT
USAGE = st.builds(
    Usage,
    input=NUMBER,
    output=NUMBER,
    cached_input=NUMBER,
    cache_write=NUMBER,
    cache_write_1h=NUMBER,
    reasoning=NUMBER,
    billed_input=st.none() | NUMBER,
    billed_output=st.none() | NUMBER,
    cost=MAYBE,
    currency=MAYBE,
    raw=st.none() | st.dictionaries(TEXT, JSON, max_size=3),
)
CALL = st.builds(ToolCall, index=NUMBER, id=MAYBE, name=MAYBE, arguments=TEXT, signature=MAYBE)
ANNOTATION = st.builds(
    Annotation,
    kind=TEXT,
    url=MAYBE,
    title=MAYBE,
    quote=MAYBE,
    start=st.none() | NUMBER,
    end=st.none() | NUMBER,
    number=st.none() | NUMBER,
    raw=JSON,
)
SIGNATURE = st.builds(Signature, kind=TEXT, data=TEXT, details=st.dictionaries(TEXT, JSON, max_size=2))
BINARY = st.builds(Binary, media_type=TEXT, data=st.binary(max_size=9), continues=st.booleans())
PART: st.SearchStrategy[Part] = st.one_of(
    st.builds(Text, TEXT, NUMBER, AT),
    st.builds(Reasoning, TEXT, NUMBER, AT),
    st.builds(Refusal, TEXT, NUMBER, AT),
    st.builds(ToolCallPart, CALL, NUMBER, AT),
    st.builds(BinaryPart, BINARY, NUMBER, AT),
    st.builds(AnnotationPart, ANNOTATION, NUMBER, AT),
    st.builds(SignaturePart, SIGNATURE, NUMBER, AT),
    st.builds(ExtraPart, st.builds(Extra, kind=TEXT, data=JSON), NUMBER, AT),
    st.builds(Omitted, TEXT, TEXT),
    st.builds(Finish, TEXT, NUMBER),
    st.builds(UsagePart, USAGE),
    st.builds(UsageBegun, USAGE),
    st.builds(Identity, MAYBE, MAYBE),
    st.just(Alive()),
)
ENDING: st.SearchStrategy[Part] = st.just(End()) | st.builds(
    UpstreamFailure, TEXT, TEXT, st.none() | NUMBER, st.booleans(), AT
)


def generation() -> Generation:
    return Generation(
        "g",
        epoch=1,
        next_seq=0,
        counter=lambda: GenerationCounter("o200k_base", True),
        counted_input=3,
        exact=True,
        encoding="o200k_base",
    )


def built(parts: list[Part], ending: Part | None = None) -> list[AnyEvent]:
    run = generation()
    return [*run.absorb([*parts, *([ending] if ending else [])], 1.0), *run.end(2.0)]


def check_every_reader(events: list[AnyEvent]) -> None:
    """Offer events to all that read the log; each must take each of them."""
    position, transcript, begun = BEGINNING, Transcript(), Begun()
    stored = [encode_event(event) for event in events]
    subject = token_subject(ADDRESS)
    for seq, data in enumerate(stored, 1):
        event, header = decode_event(data), decode_header(data)
        assert decode_event(encode_event(event)) == event
        position, verdict = judge(position, header.type, header.epoch, header.seq)
        assert verdict is Verdict.ACCEPTED
        assert read_header(subject, data) == header
        message = typed(data)
        assert message.WhichOneof("kind") in (header.type, "json")
        assert pb.Event.FromString(message.SerializeToString()) == message
        if isinstance(event, Delta):
            contents = [name for name in CONTENTS if getattr(event, name) is not None]
            assert len(contents) == 1, contents
            assert message.delta.WhichOneof("content") == contents[0]
        entry = Entry(seq, "g", header.type, data)
        assert msgpack_frame(entry, FormatAddress("s", b"c"))
        shown = [e for e in Chunker(Granularity("line"), Position(seq - 1)).offer(entry, 0.0) if e.data == data]
        assert shown or isinstance(event, Delta)
        transcript.offer(data)
        begun.take(data, seq)
    folded = fold(None, ADDRESS, [read_record(seq, subject, data) for seq, data in enumerate(stored, 1)])
    assert set(folded.verdicts) <= {"accepted"}
    assert transcript.events == len(events)
    assert (begun.position, begun.position.ended) == (position, True)
    assert msgspec.json.encode([a.message() for a in transcript.answers])


CONTENTS = ("text", "reasoning", "refusal", "tool_call", "binary", "annotation", "signature", "extra")


@settings(max_examples=300, deadline=None)
@given(st.lists(PART, max_size=8), st.none() | ENDING)
def test_every_event_that_a_producer_can_build_is_read_by_every_reader(parts: list[Part], ending: Part | None) -> None:
    check_every_reader(built(parts, ending))


@pytest.mark.parametrize("number", [-1, 2**53, 10**30])
def test_numbers_out_of_bounds_never_reach_the_log(number: int) -> None:
    parts: list[Part] = [
        Text("a", number),
        ToolCallPart(ToolCall(index=number, name="f", arguments="{}"), number),
        UsagePart(Usage(input=4, output=2)),
        UsagePart(Usage(input=4, output=number)),
        End(),
    ]
    events = built(parts)
    check_every_reader(events)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [(d.choice, d.text) for d in deltas if d.text] == [(0, "a")]
    assert [d.tool_call.arguments for d in deltas if d.tool_call] == ["{}"]
    usage = next(event.usage for event in events if isinstance(event, UsageReported))
    assert (usage.input, usage.output) == (4, 2), "the last report that is possible holds"


def test_large_content_is_split_and_reassembled_unchanged() -> None:
    text, data = "\x01" * (2 * PIECE_CHARS + 7), bytes(range(256)) * 5_000
    parts: list[Part] = [
        Text(text),
        Refusal(text, 1),
        BinaryPart(Binary(media_type="image/png", data=data)),
        ToolCallPart(ToolCall(id="c", name="f", arguments=text)),
        End(),
    ]
    events = built(parts)
    check_every_reader(events)
    assert max(len(encode_event(event)) for event in events) <= EVENT_BYTES
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(d.text or "" for d in deltas) == text
    assert "".join(d.refusal or "" for d in deltas) == text
    pieces = [d.binary for d in deltas if d.binary]
    assert b"".join(piece.data for piece in pieces) == data
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert len(pieces) == math.ceil(len(data) / PIECE_BYTES)
    calls = [d.tool_call for d in deltas if d.tool_call]
    assert "".join(call.arguments for call in calls) == text
    assert [(call.id, call.name) for call in calls] == [("c", "f")] + [(None, None)] * (len(calls) - 1)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("data", ["x" * (JSON_BYTES + 1), deep(5_000)], ids=["large", "deep"])
def test_content_that_cannot_be_split_is_omitted_with_one_notice(data: Any) -> None:
    extra = Extra(kind="web_fetch_tool_result", data=data)
    events = built([ExtraPart(extra), Text("a"), ExtraPart(extra), UsagePart(Usage(input=1, raw={"a": data})), End()])
    check_every_reader(events)
    notices = [event for event in events if isinstance(event, Notice)]
    assert [notice.code for notice in notices] == ["content_omitted"]
    assert "web_fetch_tool_result" in notices[0].message
    assert not any(isinstance(event, Delta) and event.extra for event in events)
    usage = next(event.usage for event in events if isinstance(event, UsageReported))
    assert (usage.input, usage.raw) == (1, None)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a JSON value, and of the value itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, item in inner for place in places(item, (*path, name)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another one at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


# What strict JSON can say: what it cannot is the business of those that read the wire.
WIRE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([-(2**63), 2**53, 10**30, 0.5, -1.5, 1e300])
    | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "url", "id", "index", "function", "google"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_answers_with_arbitrary_values_become_events_that_every_reader_accepts(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    blocks = transcript.wire.replace(b"\r\n", b"\n").split(b"\n\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blocks) - 1))
        head, mark, payload = blocks[at].rpartition(b"data: ")
        try:
            value = json.loads(payload)
        except ValueError:
            continue
        path = data.draw(st.sampled_from(places(value)))
        new = json.dumps(changed(value, path, data.draw(WIRE))).encode()
        blocks[at] = head + mark + new
    run, parser = generation(), transcript.parser()
    events = run.absorb(parser.feed(b"\n\n".join(blocks)), 1.0)
    check_every_reader([*events, *run.end(2.0)])
