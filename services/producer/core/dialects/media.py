"""Convert providers' content to parts: images and other files, sources, texts in lists."""

import base64
import urllib.parse
from typing import Any, Final

from schemas.events import Annotation, Binary, Extra
from services.producer.core.bounds import number
from services.producer.core.parts import BinaryPart, ExtraPart

__all__ = ["annotation", "file_part", "from_base64", "text_of"]

_ADDRESSES: Final = ("image_url", "audio_url", "video_url", "file_url", "url", "b64_json")
_QUOTES: Final = ("cited_text", "content", "quote", "snippet")
_TEXTS: Final = ("text", "content", "thinking", "summary")
_TITLES: Final = ("title", "document_title", "name", "filename")
_STARTS: Final = ("start_index", "start")
_ENDS: Final = ("end_index", "end")
_URL_SAFE: Final = str.maketrans("-_", "+/")


def text_of(value: Any) -> str:
    """Return the text of a value: a string, a part, or a list of parts (Mistral)."""
    match value:
        case str():
            return value
        case list():
            return "".join(text_of(item) for item in value)
        case dict():
            return next(
                (text_of(value[name]) for name in ("text", "content", "thinking", "summary") if value.get(name)), ""
            )
        case _:
            return ""


def file_part(kind: str, value: Any, choice: int = 0, at: float | None = None) -> BinaryPart | ExtraPart:
    """Return an image or another file: its bytes if included (a data URL, base64), else the object as sent."""
    found = _address(value)
    binary = None
    if found is not None:
        field, address = found
        media_type = value.get("media_type") or value.get("mime_type") if isinstance(value, dict) else None
        if address.startswith("data:"):
            binary = _data_url(address)
        elif field == "b64_json":
            binary = _bytes(media_type if isinstance(media_type, str) else "image/png", address)
    if binary is not None:
        return BinaryPart(binary, choice, at)
    return ExtraPart(Extra(kind=kind, data=value), choice, at)


def from_base64(data: str) -> bytes:
    """Decode base64, in either alphabet, with or without padding and line ends.

    Raises:
        ValueError: ``data`` is not base64.
    """
    data = "".join(data.split()).rstrip("=").translate(_URL_SAFE)
    return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)


def annotation(raw: Any, kind: str = "citation", mark: int | None = None) -> Annotation:
    """Return a source from any form: OpenAI's and OpenRouter's annotations, Perplexity's, Anthropic's, Cohere's.

    ``mark``: its number in the answer.
    """
    if not isinstance(raw, dict):
        return Annotation(kind=kind, url=raw if isinstance(raw, str) else None, number=mark, raw=raw)
    kind = raw["type"] if isinstance(raw.get("type"), str) and raw["type"] else kind
    inner = raw.get(kind)
    fields = inner if isinstance(inner, dict) else raw
    return Annotation(
        kind=kind,
        url=_first(fields, ("url",)),
        title=_first(fields, _TITLES),
        quote=_first(fields, _QUOTES),
        start=_number(fields, _STARTS),
        end=_number(fields, _ENDS),
        number=mark,
        raw=raw,
    )


def _address(value: Any) -> tuple[str, str] | None:
    """Return the address of a file and the field that holds it, through one level of nesting."""
    if isinstance(value, str):
        return "url", value
    if not isinstance(value, dict):
        return None
    for field in _ADDRESSES:
        inner = value.get(field)
        if isinstance(inner, dict):
            inner = inner.get("url")
        if isinstance(inner, str):
            return field, inner
    return None


def _data_url(url: str) -> Binary | None:
    """Decode a data URL (RFC 2397)."""
    head, comma, data = url.removeprefix("data:").partition(",")
    if not comma:
        return None
    if head.endswith(";base64"):
        return _bytes(head.removesuffix(";base64") or "text/plain", data)
    return Binary(media_type=head or "text/plain", data=urllib.parse.unquote_to_bytes(data))


def _bytes(media_type: str, data: str) -> Binary | None:
    try:
        return Binary(media_type=media_type, data=from_base64(data))
    except ValueError:
        return None


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((value for name in names if isinstance(value := fields.get(name), str) and value), None)


def _number(fields: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := number(fields.get(name))) is not None), None)
