"""Test the gRPC protocol: generated code is up to date, and hand-joined messages are valid protobuf."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import encode_event
from schemas.events import (
    Annotation,
    AnyEvent,
    Binary,
    Cancelled,
    Completed,
    Delta,
    Extra,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Signature,
    Started,
    ToolCall,
    UsageReported,
    type_of,
)
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from schemas.usage import MAX_NUMBER, Counted, Usage
from services.delivery.formats.format import Address
from services.delivery.formats.protobuf import PROTOBUF, item, item_read
from services.delivery.formats.tail import Entry

RPC = Path(pb.__file__).parents[2]
AT = Address("s", b"t100" + b"0123456789abcdef")
NUMBERS = st.integers(0, MAX_NUMBER)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
COUNTED = st.builds(Counted, input=NUMBERS, output=NUMBERS, exact=st.booleans(), encoding=TEXT)
USAGE = st.builds(
    Usage,
    input=NUMBERS,
    output=NUMBERS,
    cached_input=NUMBERS,
    billed_input=st.none() | NUMBERS,
    cost=st.none() | TEXT,
    raw=st.none() | st.dictionaries(TEXT, TEXT, max_size=2),
)
HEAD: dict[str, Any] = {
    "generation": st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    "seq": NUMBERS,
    "epoch": st.integers(1, MAX_NUMBER),
    "at": st.floats(0, 1e12),
}
OBJECTS = st.dictionaries(TEXT, TEXT, max_size=2)
DELTAS = st.one_of(
    st.builds(Delta, **HEAD, text=TEXT, tokens=NUMBERS, choice=NUMBERS),
    st.builds(Delta, **HEAD, reasoning=TEXT, provider_at=st.none() | st.floats(0, 1e12)),
    st.builds(Delta, **HEAD, tool_call=st.builds(ToolCall, index=NUMBERS, id=st.none() | TEXT, arguments=TEXT)),
    st.builds(
        Delta,
        **HEAD,
        binary=st.builds(Binary, media_type=TEXT, data=st.binary(max_size=300), continues=st.booleans()),
    ),
    st.builds(Delta, **HEAD, refusal=TEXT),
    st.builds(
        Delta,
        **HEAD,
        annotation=st.builds(
            Annotation, kind=TEXT, url=st.none() | TEXT, start=st.none() | NUMBERS, number=NUMBERS, raw=OBJECTS
        ),
    ),
    st.builds(Delta, **HEAD, signature=st.builds(Signature, kind=TEXT, data=TEXT, details=OBJECTS)),
    st.builds(Delta, **HEAD, extra=st.builds(Extra, kind=TEXT, data=st.none() | OBJECTS)),
)
EVENTS = st.one_of(
    DELTAS,
    st.builds(Started, **HEAD, model=TEXT, provider=TEXT, upstream_model=TEXT, counted=COUNTED),
    st.builds(Notice, **HEAD, code=TEXT, message=TEXT, attempt=st.none() | st.integers(-(2**63), 2**63 - 1)),
    st.builds(Restarted, **HEAD, reason=TEXT),
    st.builds(UsageReported, **HEAD, usage=USAGE),
    st.builds(Completed, **HEAD, finish_reason=TEXT, finish_reasons=st.lists(TEXT, max_size=3), counted=COUNTED),
    st.builds(Failed, **HEAD, code=TEXT, recoverable=st.booleans(), counted=COUNTED),
    st.builds(Cancelled, **HEAD, reason=TEXT, counted=COUNTED),
    st.builds(Interrupted, **HEAD, reason=TEXT, counted=COUNTED),
)


PROTOC = ["-m", "grpc_tools.protoc", "-I", "schemas/rpc"]
PROTO = "tailrace/v1/tailrace.proto"
DOCUMENTED = [*PROTOC, "--python_out=schemas/rpc", "--pyi_out=schemas/rpc", "tailrace/v1/tailrace.proto"]


def protoc(folder: Path, arguments: list[str]) -> Path:
    """Run protoc on a copy of the protocol, and return where it lies."""
    copy = folder / "schemas/rpc" / PROTO
    copy.parent.mkdir(parents=True)
    copy.write_text((RPC / PROTO).read_text())
    subprocess.run([sys.executable, *arguments], check=True, cwd=folder, timeout=60)
    return copy.parent


def without_version(text: str) -> str:
    """Return protoc's output without its version."""
    text = re.sub(r"(?m)^# Protobuf Python Version: .*$", "", text)
    return re.sub(r"ValidateProtobufRuntimeVersion\(.*?\)", "", text, flags=re.DOTALL)


def test_committed_code_equals_the_output_of_protoc(tmp_path: Path) -> None:
    folder = protoc(tmp_path, DOCUMENTED)
    for name in ("tailrace_pb2.py", "tailrace_pb2.pyi"):
        made, committed = (folder / name).read_text(), (RPC / "tailrace/v1" / name).read_text()
        assert without_version(made) == without_version(committed), f"{name} is old: see CONTRIBUTING.md"


def test_a_client_generated_from_the_protocol_has_all_methods(tmp_path: Path) -> None:
    path = protoc(tmp_path, [*PROTOC, "--grpc_python_out=schemas/rpc", PROTO]) / "tailrace_pb2_grpc.py"
    source = path.read_text().replace("from tailrace.v1 import", "from schemas.rpc.tailrace.v1 import")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("tailrace_pb2_grpc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [n for n in vars(module.DeliveryServicer) if not n.startswith("_")] == [
        "Read",
        "Attach",
        "Consume",
        "Start",
        "Cancel",
        "GetGeneration",
    ]


def entry(event: AnyEvent, seq: int) -> Entry:
    return Entry(seq, event.generation, type_of(event), encode_event(event))


@given(st.lists(EVENTS, min_size=1, max_size=5), st.integers(1, 2**40))
def test_joined_frames_are_one_message_with_each_event_and_its_cursor(events: list[AnyEvent], seq: int) -> None:
    frames = [PROTOBUF.frame(entry(event, seq + n), AT) for n, event in enumerate(events)]
    batch = PROTOBUF.message([PROTOBUF.gap("beginning_expired", "g", AT), *frames], ends=False)
    gap, *got = pb.ReadResponse.FromString(batch.data).frames
    assert gap.gap.generation == "g"
    assert [(e.event.generation, e.event.seq, e.event.type) for e in got] == [
        (e.generation, e.seq, type_of(e)) for e in events
    ]
    assert [e.event.cursor for e in got] == [AT.cursor(seq + n).decode() for n in range(len(events))]
    assert all(e.event.WhichOneof("kind") == e.event.type for e in got)
    assert (batch.events, batch.size) == (len(events), sum(map(len, frames)))
    assert batch.cursor == AT.cursor(seq + len(events) - 1)


@given(DELTAS)
def test_every_field_of_a_delta_survives(event: Delta) -> None:
    got = pb.ReadResponse.FromString(PROTOBUF.frame(entry(event, 1), AT)).frames[0].event
    assert (got.at, got.epoch) == (event.at, event.epoch)
    match got.delta.WhichOneof("content"):
        case "text":
            assert (got.delta.text, got.delta.tokens, got.delta.choice) == (event.text, event.tokens, event.choice)
        case "reasoning":
            assert got.delta.reasoning == event.reasoning
            assert (got.delta.provider_at if got.delta.HasField("provider_at") else None) == event.provider_at
        case "tool_call":
            assert event.tool_call is not None
            assert got.delta.tool_call.arguments == event.tool_call.arguments
            assert got.delta.tool_call.HasField("id") == (event.tool_call.id is not None)
        case "refusal":
            assert got.delta.refusal == event.refusal
        case "annotation":
            assert event.annotation is not None
            annotation = got.delta.annotation
            assert annotation.number == event.annotation.number
            assert annotation.HasField("url") == (event.annotation.url is not None)
            assert (annotation.start if annotation.HasField("start") else None) == event.annotation.start
            assert msgspec.json.decode(annotation.raw) == event.annotation.raw
        case "signature":
            assert event.signature is not None
            signature = got.delta.signature
            assert (signature.kind, signature.data) == (event.signature.kind, event.signature.data)
            assert msgspec.json.decode(signature.details or b"{}") == event.signature.details
        case "extra":
            assert event.extra is not None
            assert (msgspec.json.decode(got.delta.extra.data) if got.delta.extra.data else None) == event.extra.data
        case "binary":
            assert event.binary is not None
            assert (got.delta.binary.data, got.delta.binary.continues) == (event.binary.data, event.binary.continues)


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"novelty","generation":"g","seq":3,"epoch":2,"at":1.5,"x":{"y":1}}',
        b'{"type":"delta","generation":"g","seq":3,"epoch":2,"at":1.5,"text":5}',
        b'{"type":"notice","generation":"g","seq":3,"epoch":2,"at":1.5,"code":"x","attempt":99999999999999999999}',
    ],
)
def test_events_that_do_not_fit_typed_fields_are_carried_as_stored_json(data: bytes) -> None:
    got = pb.ReadResponse.FromString(PROTOBUF.frame(Entry(1, "g", "x", data), AT)).frames[0].event
    assert (got.generation, got.seq, got.epoch, got.at, got.json) == ("g", 3, 2, 1.5, data)


def test_cursor_inside_of_an_event_is_found_too() -> None:
    piece = Entry(7, "g", "delta", encode_event(Delta(generation="g", seq=1, text="hal")), offset=3)
    batch = PROTOBUF.message([PROTOBUF.frame(piece, AT)], ends=False)
    assert batch.cursor == AT.after(piece)
    assert pb.ReadResponse.FromString(batch.data).frames[0].event.cursor == AT.after(piece).decode()


def test_message_without_events_has_no_cursor() -> None:
    for frame in (PROTOBUF.bye("drain", 9, AT), PROTOBUF.gap("log_recreated", None, AT)):
        assert PROTOBUF.message([frame], ends=True)[1:] == (0, 0, b"")
    assert pb.ReadResponse.FromString(PROTOBUF.bye("drain", 9, AT)).frames[0].bye.cursor == AT.cursor(9).decode()


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64), st.lists(DELTAS, max_size=3))
def test_items_are_joined_into_one_message_of_attach(id_: str, events: list[AnyEvent]) -> None:
    batch = PROTOBUF.message([PROTOBUF.frame(entry(event, 1), AT) for event in events], ends=False)
    got = pb.AttachResponse.FromString(item(id_, subscribed=pb.Subscribed(cursor="c")) + item_read(id_, batch.data))
    assert [i.id for i in got.items] == [id_, id_]
    assert got.items[0].subscribed.cursor == "c"
    assert [f.event.seq for f in got.items[1].read.frames] == [event.seq for event in events]
