"""Frame events for gRPC: encode each event once, and build responses by concatenation.

A repeated field of a protobuf message is the concatenation of its elements, and so is a message with no other field.
So `ReadResponse` and `AttachResponse` are built from encoded pieces, for all subscribers at once.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from schemas.codec import MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import (
    AbandonedCall,
    Annotation,
    AnyEvent,
    Cancelled,
    Completed,
    Delta,
    Event,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Started,
    ToolCall,
    UsageReported,
)
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from schemas.usage import Counted, Usage
from services.delivery.formats.format import Address
from services.delivery.formats.tail import Entry

__all__ = ["PROTOBUF", "Batch", "ProtobufFrames", "item", "item_read", "typed"]

_FRAMES: Final = b"\x0a"  # field 1, with a length: ReadResponse.frames, AttachResponse.items, Frame.event
_CURSOR: Final = b"\x52"  # Event.cursor: field 10, with a length
_CURSOR_ENDS: Final = ((32, b"R "), (41, b"R)"))  # length of a cursor, and its field's tag with that length
_ID: Final = b"\x0a"  # Item.id: field 1
_READ: Final = b"\x12"  # Item.read: field 2


class Batch(NamedTuple):
    """One encoded `ReadResponse` and its number of events.

    ``cursor``: cursor after its last event, empty without events. ``size``: bytes of the events' frames.
    """

    data: bytes
    events: int
    size: int
    cursor: bytes


class ProtobufFrames:
    """Encode each event as an element of `ReadResponse.frames`, its cursor last."""

    protocol = "grpc"

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return one event; content without typed fields is carried as the stored JSON."""
        event = typed(entry.data).SerializeToString()
        cursor = at.after(entry)
        return _piece(_FRAMES, _piece(_FRAMES, event + _piece(_CURSOR, cursor)))

    def message(self, frames: Sequence[bytes], *, ends: bool) -> Batch:
        """Return a batch of these frames."""
        cursors = [_cursor(frame) for frame in frames]
        sizes = [len(frame) for frame, cursor in zip(frames, cursors, strict=True) if cursor]
        cursor = next((cursor for cursor in reversed(cursors) if cursor), b"")
        return Batch(b"".join(frames), len(sizes), sum(sizes), cursor)

    def opening(self, at: Address) -> bytes:
        """Return no bytes: the call's initial metadata signals that it is open."""
        return b""

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return a frame with a `Gap`."""
        frame = pb.Frame(gap=pb.Gap(reason=reason, generation=generation or ""))
        return _piece(_FRAMES, frame.SerializeToString())

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return a frame with a `Bye`."""
        frame = pb.Frame(bye=pb.Bye(reason=reason, cursor=at.cursor(seq).decode()))
        return _piece(_FRAMES, frame.SerializeToString())

    def heartbeat(self) -> None:
        """Return None: HTTP/2 has its own pings."""


PROTOBUF: Final = ProtobufFrames()


def item_read(id_: str, response: bytes) -> bytes:
    """Return an `AttachResponse` with one item: an encoded `ReadResponse` of the subscription ``id_``."""
    return _piece(_FRAMES, _piece(_ID, id_.encode()) + _piece(_READ, response))


def item(id_: str, **kind: Any) -> bytes:
    """Return an `AttachResponse` with one item of another kind than `read`."""
    return pb.AttachResponse(items=[pb.Item(id=id_, **kind)]).SerializeToString()


def _piece(tag: bytes, data: bytes) -> bytes:
    """Return a length-delimited field."""
    size = len(data)
    if size < 128:
        return tag + bytes((size,)) + data
    length = bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return tag + length + data


def _cursor(frame: bytes) -> bytes:
    """Return the cursor at the end of an event's frame; it is unambiguous, since names hold neither " " nor ")"."""
    for length, field in _CURSOR_ENDS:
        if frame[-length - 2 : -length] == field:
            return frame[-length:]
    return b""


def typed(data: bytes) -> pb.Event:
    """Return an event with typed fields, without its cursor; other content is carried as the stored JSON."""
    try:
        event: Any = decode_event(data)
        message = _event(event)
    except (UnknownEvent, MalformedEvent, ValueError):  # ValueError: a number or text that protobuf does not carry
        header = decode_header(data)
        return pb.Event(
            generation=header.generation,
            seq=header.seq,
            epoch=header.epoch,
            at=header.at,
            type=header.type,
            json=data,
        )
    return message


def _event(event: AnyEvent) -> pb.Event:
    match event:
        case Delta():
            return _head(event, "delta", delta=_delta(event))
        case Started():
            started = pb.Started(
                model=event.model,
                provider=event.provider,
                upstream_model=event.upstream_model,
                counted=_counted(event.counted),
                metadata=event.metadata,
            )
            return _head(event, "started", started=started)
        case UsageReported():
            usage = pb.UsageReported(
                usage=_usage(event.usage),
                provider=event.provider,
                upstream_model=event.upstream_model,
                upstream_id=event.upstream_id,
                source=event.source,
                call=event.call,
            )
            return _head(event, "usage", usage=usage)
        case Notice():
            notice = pb.Notice(
                code=event.code,
                message=event.message,
                attempt=event.attempt,
                provider=event.provider,
                upstream_model=event.upstream_model,
                delay=event.delay,
                call=_call(event.call),
            )
            return _head(event, "notice", notice=notice)
        case Restarted():
            restarted = pb.Restarted(
                reason=event.reason,
                provider=event.provider,
                upstream_model=event.upstream_model,
                call=_call(event.call),
            )
            return _head(event, "restarted", restarted=restarted)
        case _:
            return _terminal(event)


def _terminal(event: Completed | Failed | Cancelled | Interrupted) -> pb.Event:
    counted = _counted(event.counted)
    match event:
        case Completed():
            completed = pb.Completed(
                finish_reason=event.finish_reason, finish_reasons=event.finish_reasons, counted=counted
            )
            return _head(event, "completed", completed=completed)
        case Failed():
            failed = pb.Failed(
                code=event.code,
                message=event.message,
                upstream_status=event.upstream_status,
                recoverable=event.recoverable,
                counted=counted,
            )
            return _head(event, "failed", failed=failed)
        case Cancelled():
            return _head(event, "cancelled", cancelled=pb.Cancelled(reason=event.reason, counted=counted))
        case Interrupted():
            return _head(event, "interrupted", interrupted=pb.Interrupted(reason=event.reason, counted=counted))


def _head(event: Event, type_: str, **kind: Any) -> pb.Event:
    return pb.Event(generation=event.generation, seq=event.seq, epoch=event.epoch, at=event.at, type=type_, **kind)


def _delta(event: Delta) -> pb.Delta:
    call, binary, signature, extra = event.tool_call, event.binary, event.signature, event.extra
    return pb.Delta(
        text=event.text,
        reasoning=event.reasoning,
        tool_call=_tool_call(call) if call else None,
        binary=pb.Binary(media_type=binary.media_type, data=binary.data, continues=binary.continues)
        if binary
        else None,
        refusal=event.refusal,
        annotation=_annotation(event.annotation) if event.annotation else None,
        signature=pb.Signature(kind=signature.kind, data=signature.data, details=_json(signature.details or None))
        if signature
        else None,
        extra=pb.Extra(kind=extra.kind, data=_json(extra.data)) if extra else None,
        choice=event.choice,
        tokens=event.tokens,
        provider_at=event.provider_at,
    )


def _tool_call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(index=call.index, id=call.id, name=call.name, arguments=call.arguments, signature=call.signature)


def _annotation(annotation: Annotation) -> pb.Annotation:
    return pb.Annotation(
        kind=annotation.kind,
        url=annotation.url,
        title=annotation.title,
        quote=annotation.quote,
        start=annotation.start,
        end=annotation.end,
        number=annotation.number,
        raw=_json(annotation.raw),
    )


def _json(value: Any) -> bytes:
    return b"" if value is None else msgspec.json.encode(value)


def _call(call: AbandonedCall | None) -> pb.AbandonedCall | None:
    if call is None:
        return None
    return pb.AbandonedCall(
        number=call.number,
        code=call.code,
        provider=call.provider,
        upstream_model=call.upstream_model,
        upstream_id=call.upstream_id,
        counted=_counted(call.counted),
        usage=None if call.usage is None else _usage(call.usage),
        source=call.source,
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        input=usage.input,
        output=usage.output,
        cached_input=usage.cached_input,
        cache_write=usage.cache_write,
        cache_write_1h=usage.cache_write_1h,
        reasoning=usage.reasoning,
        billed_input=usage.billed_input,
        billed_output=usage.billed_output,
        cost=usage.cost,
        currency=usage.currency,
        reasons=usage.reasons,
        raw=_json(usage.raw),
    )


def _counted(counted: Counted) -> pb.Counted | None:
    if counted == Counted():
        return None
    return pb.Counted(input=counted.input, output=counted.output, exact=counted.exact, encoding=counted.encoding)
