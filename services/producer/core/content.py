"""Convert parts other than plain text to contents of deltas, each within the bounds of an event."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from schemas.events import Annotation, Binary, Extra, Signature, ToolCall
from services.producer.core.bounds import JSON_BYTES, NAME_CHARS, PIECE_BYTES, PIECE_CHARS, fits, number, pieces
from services.producer.core.parts import AnnotationPart, BinaryPart, ExtraPart, Omitted, SignaturePart, ToolCallPart

__all__ = ["Content", "ContentPart", "contents"]

ContentPart = ToolCallPart | BinaryPart | AnnotationPart | SignaturePart | ExtraPart
_TOO_LARGE = f"larger than {JSON_BYTES} bytes, or nested too deeply"


class Content(NamedTuple):
    """The content of one delta: the name of its field, and the value."""

    field: str
    value: ToolCall | Binary | Annotation | Signature | Extra


def contents(part: ContentPart) -> Iterator[Content | Omitted]:
    """Yield the contents of ``part``, split where it is too large for one event; `Omitted` where it cannot be split."""
    match part:
        case ToolCallPart():
            yield from _tool_call(part.tool_call)
        case BinaryPart():
            yield from _binary(part.binary)
        case AnnotationPart():
            yield _annotation(part.annotation)
        case SignaturePart():
            signature = part.signature
            kept = msgspec.structs.replace(signature, kind=signature.kind[:NAME_CHARS])
            yield _kept("signature", kept, signature.kind)
        case ExtraPart():
            extra = part.extra
            yield _kept("extra", msgspec.structs.replace(extra, kind=extra.kind[:NAME_CHARS]), extra.kind)


def _tool_call(call: ToolCall) -> Iterator[Content | Omitted]:
    """Yield a fragment in pieces; only the first one names the call."""
    if call.signature is not None and not fits(call.signature):
        yield Omitted("signature", _TOO_LARGE)
        call = msgspec.structs.replace(call, signature=None)
    index = number(call.index) or 0
    first, *rest = pieces(call.arguments, PIECE_CHARS)
    yield Content(
        "tool_call",
        ToolCall(index=index, id=_cut(call.id), name=_cut(call.name), arguments=first, signature=call.signature),
    )
    for piece in rest:
        yield Content("tool_call", ToolCall(index=index, arguments=piece))


def _binary(binary: Binary) -> Iterator[Content]:
    continues = binary.continues
    for piece in pieces(binary.data, PIECE_BYTES):
        yield Content("binary", Binary(media_type=binary.media_type[:NAME_CHARS], data=piece, continues=continues))
        continues = True


def _annotation(annotation: Annotation) -> Content | Omitted:
    kept = msgspec.structs.replace(
        annotation,
        kind=annotation.kind[:NAME_CHARS],
        start=number(annotation.start),
        end=number(annotation.end),
        number=number(annotation.number),
    )
    if not fits(msgspec.structs.asdict(kept)):
        kept = msgspec.structs.replace(kept, raw=None, quote=None)
    return _kept("annotation", kept, annotation.kind)


def _kept(field: str, value: Annotation | Signature | Extra, kind: str) -> Content | Omitted:
    if fits(msgspec.structs.asdict(value)):
        return Content(field, value)
    return Omitted(kind[:NAME_CHARS] or field, _TOO_LARGE)


def _cut(name: str | None) -> str | None:
    return name[:NAME_CHARS] if name is not None else None
