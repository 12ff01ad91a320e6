"""Convert the content of chat completion deltas other than plain text and tool calls to parts.

Compatible servers add their own fields. Common ones become parts of their kind; other texts, lists and objects are kept
unchanged. A field with the same value in every chunk is kept once.
"""

from typing import Any, Final

from schemas.events import Binary, Extra, Signature
from services.producer.core.dialects.joined import Joined
from services.producer.core.dialects.media import annotation, file_part, from_base64, text_of
from services.producer.core.parts import (
    AnnotationPart,
    BinaryPart,
    ExtraPart,
    Omitted,
    Reasoning,
    Refusal,
    SignaturePart,
    Text,
)

__all__ = ["REASONING", "OtherContent", "is_thought", "thought_signature"]

REASONING: Final = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
"""Names of the reasoning field; if a delta has several, they have the same value."""
_ELSEWHERE: Final = frozenset({"content", "refusal", "tool_calls", "function_call", *REASONING})
_NO_CONTENT: Final = frozenset(
    {
        "channel",
        "content_filter_offsets",
        "content_filter_result",
        "content_filter_results",
        "id",
        "logprobs",
        "name",
        "obfuscation",
        "phase",
        "prompt_token_ids",
        "provider_specific_fields",
        "role",
        "stop_reason",
        "token_ids",
        "type",
    }
)
_CITATIONS: Final = ("reference", "citation", "url_citation", "file_citation")
_AUDIO: Final = "audio/pcm"
"""Media type of streamed audio (16 bits, 24,000 a second, one channel): OpenAI streams no other format."""
_SOURCES: Final = 1_000
"""Bound of the remembered sources, which let each source of a growing list be returned once."""
_REMEMBERED: Final = 100
"""Bound of the fields with a remembered last value."""


class OtherContent:
    """Add the content of deltas and chunks other than text and tool calls to ``joined``."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._sources: set[tuple[int, str | int]] = set()
        self._audio: set[int] = set()  # choices with audio
        self._last: dict[tuple[int, str], int] = {}  # hash of the last value

    def delta(self, delta: dict[str, Any], choice: int, at: float | None) -> None:
        """Add the fields of a delta that are neither text nor tool calls."""
        spoken = any(isinstance(delta.get(name), str) and delta[name] for name in REASONING)
        for field, value in delta.items():
            if not value or field in _ELSEWHERE or field in _NO_CONTENT or isinstance(value, bool | int | float):
                continue
            match field:
                case "reasoning_details":
                    self._reasoning_details(value, spoken, choice, at)
                case "thinking_blocks":
                    self._thinking_blocks(value, choice, at)
                case "images" | "image" | "videos" | "video" | "files":
                    for file in value if isinstance(value, list) else [value]:
                        self._joined.add(file_part(_kind(file, field.removesuffix("s")), file, choice, at))
                case "audio":
                    self._add_audio(value, choice, at)
                case "annotations" | "citations" | "search_results":
                    self.sources(field, value, choice, at)
                case "extra_content":
                    self._extra_content(value, choice, at)
                case _:
                    self.keep(field, value, choice, at)

    def parts(self, parts: Any, choice: int, at: float | None) -> None:
        """Add content that is a list of parts, as Mistral's, or another value that is not text."""
        for part in parts if isinstance(parts, list) else [parts]:
            if not isinstance(part, dict):
                self._text(Text, text_of(part), choice, at)
                continue
            kind = part.get("type")
            if kind in ("thinking", "reasoning") or part.get("thinking"):
                self._text(Reasoning, text_of(part.get("thinking") or part), choice, at)
                if isinstance(signature := part.get("signature"), str) and signature:
                    self._sign("thinking", signature, {}, choice, at)
                self._text(Text, text_of(part.get("text")) if kind not in ("thinking", "reasoning") else "", choice, at)
            elif kind in ("text", "output_text", None) and "text" in part:
                self._text(Text, text_of(part["text"]), choice, at)
                if part.get("annotations"):
                    self.sources("annotations", part["annotations"], choice, at)
            elif kind == "refusal":
                self._text(Refusal, text_of(part.get("refusal")), choice, at)
            elif kind in _CITATIONS:
                self._joined.add(AnnotationPart(annotation(part, kind), choice, at))
            elif part:
                self._joined.add(file_part(_kind(part, "content"), part, choice, at))

    def sources(self, field: str, value: Any, choice: int = 0, at: float | None = None) -> None:
        """Add a list of sources; sources seen before are not repeated."""
        kind = {"annotations": "annotation", "search_results": "search_result"}.get(field, "citation")
        for position, raw in enumerate(value if isinstance(value, list) else [value], 1):
            # Text refers to the entries of lists by position, but not to annotations.
            source = annotation(raw, kind, None if field == "annotations" else position)
            name = source.url if source.url and field != "annotations" else hash(repr(raw))
            if (choice, name) in self._sources:
                continue
            if len(self._sources) >= _SOURCES:
                self._joined.add(Omitted(kind, f"there are more than {_SOURCES} sources"))
                return
            self._sources.add((choice, name))
            self._joined.add(AnnotationPart(source, choice, at))

    def keep(self, field: str, value: Any, choice: int = 0, at: float | None = None) -> None:
        """Add an unknown field, unless its value is the same as before."""
        digest = hash(repr(value))
        if self._last.get((choice, field)) == digest:
            return
        if len(self._last) < _REMEMBERED or (choice, field) in self._last:
            self._last[choice, field] = digest
        self._joined.add(ExtraPart(Extra(kind=field, data=value), choice, at))

    def _text(self, kind: type[Text | Reasoning | Refusal], text: str, choice: int, at: float | None) -> None:
        if text:
            self._joined.text(kind, text, choice, at)

    def _sign(self, kind: str, data: str, details: dict[str, Any], choice: int, at: float | None) -> None:
        self._joined.add(SignaturePart(Signature(kind=kind, data=data, details=details), choice, at))

    def _reasoning_details(self, value: Any, spoken: bool, choice: int, at: float | None) -> None:
        """Add OpenRouter's form: text (usually also in ``reasoning``), signatures, encrypted reasoning."""
        for detail in value if isinstance(value, list) else [value]:
            if not isinstance(detail, dict):
                continue
            kind = str(detail.get("type") or "reasoning.text")
            if not spoken:
                self._text(
                    Reasoning, text_of({"text": detail.get("text"), "summary": detail.get("summary")}), choice, at
                )
            proof = detail.get("signature") or detail.get("data")
            if isinstance(proof, str) and proof:
                kept = {name: detail[name] for name in ("id", "format", "index") if detail.get(name) is not None}
                self._sign(kind, proof, kept, choice, at)

    def _thinking_blocks(self, value: Any, choice: int, at: float | None) -> None:
        """Add LiteLLM's form of Anthropic's blocks; their text is also in ``reasoning_content``."""
        for block in value if isinstance(value, list) else [value]:
            if not isinstance(block, dict):
                continue
            kind = "redacted_thinking" if block.get("type") == "redacted_thinking" else "thinking"
            proof = block.get("signature") or block.get("data")
            if isinstance(proof, str) and proof:
                self._sign("thinking_blocks", proof, {"type": kind}, choice, at)

    def _add_audio(self, value: Any, choice: int, at: float | None) -> None:
        """Add a chunk of audio: bytes, transcript, and the provider's identifier."""
        if not isinstance(value, dict):
            self.keep("audio", value, choice, at)
            return
        if isinstance(data := value.get("data"), str) and data:
            try:
                sound = Binary(media_type=_AUDIO, data=from_base64(data), continues=choice in self._audio)
            except ValueError:
                self._joined.add(Omitted("audio", "its base64 cannot be read"))
            else:
                self._audio.add(choice)
                self._joined.add(BinaryPart(sound, choice, at))
        self._text(Text, text_of(value.get("transcript")), choice, at)
        if named := {name: item for name, item in value.items() if item and name not in ("data", "transcript")}:
            self.keep("audio", named, choice, at)

    def _extra_content(self, value: Any, choice: int, at: float | None) -> None:
        """Add Gemini's extension: the signature of the answer, and whether its text is a thought."""
        if signature := thought_signature(value):
            self._sign("thought_signature", signature, {}, choice, at)
        elif not is_thought(value):
            self.keep("extra_content", value, choice, at)


def thought_signature(extra_content: Any) -> str | None:
    """Return the signature that Gemini's compatible endpoint attaches to a tool call or an answer."""
    signature = _google(extra_content).get("thought_signature")
    return signature if isinstance(signature, str) and signature else None


def is_thought(extra_content: Any) -> bool:
    """Return whether Gemini's compatible endpoint marks a delta's text as a thought."""
    return _google(extra_content).get("thought") is True


def _google(extra_content: Any) -> dict[str, Any]:
    google = extra_content.get("google") if isinstance(extra_content, dict) else None
    return google if isinstance(google, dict) else {}


def _kind(part: Any, otherwise: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) and kind else otherwise
