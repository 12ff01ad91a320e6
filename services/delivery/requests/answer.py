"""Fold the deltas of one choice into its content, and into a message that continues the conversation."""

from typing import Any, Final

import msgspec

from schemas.events import Annotation, Binary, Delta, Extra, Signature, ToolCall

__all__ = ["Answer", "AnswerMessage", "BinaryContent", "ChoiceAnnotation", "ChoiceExtra", "ToolCallText"]

BINARY_BYTES: Final = 2 * 1024 * 1024
"""Bytes of binary content that a look-up holds for one choice; beyond it only the size is kept."""


class ToolCallText(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One tool call of one choice, its fragments joined. ``signature``: the provider wants it back with the call."""

    choice: int = 0
    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    signature: str | None = None


class BinaryContent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An image, audio or another file of one choice, its pieces joined.

    ``seq``: the event in which it begins. ``size`` in bytes. ``data`` (base64 in JSON) is left out where there is much.
    """

    choice: int = 0
    media_type: str
    seq: int
    size: int
    data: bytes | None = None


class ChoiceAnnotation(Annotation, kw_only=True, omit_defaults=True, frozen=True):
    """A source of one choice."""

    choice: int = 0


class ChoiceExtra(Extra, kw_only=True, omit_defaults=True, frozen=True):
    """Content of one choice for which there is no field."""

    choice: int = 0


class AnswerMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A choice as a message of the next request, with all that its provider wants back."""

    choice: int = 0
    role: str
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    reasoning_content: str | None = None
    reasoning_details: list[dict[str, Any]] | None = None
    thinking_blocks: list[dict[str, Any]] | None = None
    extra_content: dict[str, Any] | None = None


class Answer:
    """Fold the deltas of one choice."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.annotations: list[ChoiceAnnotation] = []
        self.binaries: list[BinaryContent] = []
        self.extras: list[ChoiceExtra] = []
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._calls: dict[int, ToolCallText] = {}
        self._arguments: dict[int, list[str]] = {}
        self._data: list[list[bytes]] = []  # of binaries, at most `BINARY_BYTES` in all
        self._held = 0
        self._parts: list[dict[str, Any]] = []  # of the message's content, in order; texts in pieces
        self._thought: list[str] = []  # reasoning since the last signature
        self._details: list[dict[str, Any]] = []
        self._blocks: list[dict[str, Any]] = []
        self._signature: str | None = None

    def add(self, event: Delta) -> None:
        """Add the next delta."""
        if event.text is not None:
            self._texts.append(event.text)
            self._text(event.text)
        elif event.reasoning is not None:
            self._reasoning.append(event.reasoning)
            self._thought.append(event.reasoning)
        elif event.refusal is not None:
            self._refusal.append(event.refusal)
        elif event.tool_call is not None:
            self._call(event.tool_call)
        elif event.binary is not None:
            self._binary(event.binary, event.seq)
        elif event.annotation is not None:
            fields = msgspec.structs.asdict(event.annotation)
            self.annotations.append(ChoiceAnnotation(choice=self.choice, **fields))
        elif event.signature is not None:
            self._sign(event.signature)
        elif event.extra is not None:
            self._extra(event.extra)

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """The reasoning."""
        return "".join(self._reasoning)

    @property
    def refusal(self) -> str:
        """The text with which the model refused."""
        return "".join(self._refusal)

    @property
    def tool_calls(self) -> list[ToolCallText]:
        """The calls in the order of their index."""
        return [
            msgspec.structs.replace(self._calls[index], arguments="".join(self._arguments[index]))
            for index in sorted(self._calls)
        ]

    def files(self) -> list[BinaryContent]:
        """Return the binaries, with their data if it was kept."""
        return [
            msgspec.structs.replace(binary, data=b"".join(data) if sum(map(len, data)) == binary.size else None)
            for binary, data in zip(self.binaries, self._data, strict=True)
        ]

    @property
    def has_more_than_text(self) -> bool:
        """Whether its message differs from its text."""
        return bool(
            self._calls
            or self._refusal
            or self._details
            or self._blocks
            or self._signature
            or any(part["type"] != "text" for part in self._parts)
            or any(extra.kind == "audio" for extra in self.extras)
        )

    def message(self) -> AnswerMessage:
        """Return the choice as a message of the next request."""
        calls = self.tool_calls
        unsigned = "".join(self._thought) if calls and not self._details and not self._blocks else ""
        return AnswerMessage(
            choice=self.choice,
            role="assistant",
            content=self._content(),
            refusal=self.refusal or None,
            tool_calls=[_tool_call(call) for call in calls] or None,
            annotations=[a.raw for a in self.annotations if a.kind == "file" and a.raw is not None] or None,
            audio=self._audio(),
            reasoning_content=unsigned or None,
            reasoning_details=self._details or None,
            thinking_blocks=self._blocks or None,
            extra_content={"google": {"thought_signature": self._signature}} if self._signature else None,
        )

    def _content(self) -> str | list[dict[str, Any]] | None:
        if all(part["type"] == "text" for part in self._parts):
            return self.text or None
        return [{**part, "text": "".join(part["text"])} if part["type"] == "text" else part for part in self._parts]

    def _audio(self) -> dict[str, Any] | None:
        for extra in self.extras:
            if extra.kind == "audio" and isinstance(extra.data, dict) and isinstance(extra.data.get("id"), str):
                return {"id": extra.data["id"]}
        return None

    def _text(self, text: str) -> None:
        if self._parts and self._parts[-1]["type"] == "text":
            self._parts[-1]["text"].append(text)
        elif text:
            self._parts.append({"type": "text", "text": [text]})

    def _call(self, fragment: ToolCall) -> None:
        index = fragment.index
        call = self._calls.setdefault(index, ToolCallText(choice=self.choice, index=index))
        call.id = fragment.id or call.id
        call.name = fragment.name or call.name
        call.signature = fragment.signature or call.signature
        self._arguments.setdefault(index, []).append(fragment.arguments)

    def _binary(self, binary: Binary, seq: int) -> None:
        if not binary.continues or not self.binaries:
            self.binaries.append(BinaryContent(choice=self.choice, media_type=binary.media_type, seq=seq, size=0))
            self._data.append([])
        self.binaries[-1].size += len(binary.data)
        if self._held + len(binary.data) <= BINARY_BYTES:
            self._held += len(binary.data)
            self._data[-1].append(binary.data)

    def _sign(self, signature: Signature) -> None:
        thought, self._thought = "".join(self._thought), []
        match signature.kind:
            case "thinking":
                self._parts.append({"type": "thinking", "thinking": thought, "signature": signature.data})
            case "redacted_thinking":
                self._thought = [thought]
                self._parts.append({"type": "redacted_thinking", "data": signature.data})
            case "thinking_blocks":
                self._blocks.append(
                    {"type": "thinking", "thinking": thought, "signature": signature.data}
                    if signature.details.get("type") != "redacted_thinking"
                    else {"type": "redacted_thinking", "data": signature.data}
                )
            case "thought_signature":
                self._thought = [thought]
                self._signature = signature.data
            case "reasoning.text":
                self._details.append(
                    {"type": signature.kind, "text": thought, "signature": signature.data, **signature.details}
                )
            case kind:
                self._thought = [thought]
                self._details.append({"type": kind, "data": signature.data, **signature.details})

    def _extra(self, extra: Extra) -> None:
        self.extras.append(ChoiceExtra(choice=self.choice, kind=extra.kind, data=extra.data))
        # A block of a provider-side tool has its kind as its type, and is sent back at its position.
        if isinstance(extra.data, dict) and extra.data.get("type") == extra.kind and _goes_back(extra.kind):
            self._parts.append(extra.data)


def _goes_back(kind: str) -> bool:
    return kind.endswith(("_tool_use", "_tool_result")) or kind in ("container_upload", "compaction")


def _tool_call(call: ToolCallText) -> dict[str, Any]:
    message: dict[str, Any] = {
        "id": call.id or "",
        "type": "function",
        "function": {"name": call.name or "", "arguments": call.arguments},
    }
    if call.signature is not None:
        message["extra_content"] = {"google": {"thought_signature": call.signature}}
    return message
