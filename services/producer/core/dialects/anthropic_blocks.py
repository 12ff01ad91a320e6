"""The content blocks of an Anthropic message: tool calls, thinking with its signature, and blocks of other kinds.

Tools that Anthropic runs itself (web search, code execution, MCP) arrive as blocks like those of the caller's tools,
and their results as complete blocks. Clients must not call them, so these blocks are stored unchanged, for readers to
show and for the next request.
"""

from typing import Any, Final

import msgspec

from schemas.events import Extra, Signature
from services.producer.core.bounds import JSON_BYTES
from services.producer.core.dialects.joined import Joined
from services.producer.core.dialects.media import annotation
from services.producer.core.dialects.tool_calls import ToolCalls
from services.producer.core.parts import AnnotationPart, ExtraPart, Omitted, Reasoning, SignaturePart, Text

__all__ = ["Blocks"]

_BLOCKS: Final = 1_000
"""Bound of the open blocks."""


class _Block:
    """An open block: its start, and its JSON and signature so far."""

    __slots__ = ("fields", "json", "kind", "signature", "size")

    def __init__(self, kind: str, fields: dict[str, Any]) -> None:
        self.kind = kind
        self.fields = fields
        self.json: list[str] = []  # of a block that is stored unchanged; at most `JSON_BYTES` characters
        self.size = 0
        self.signature = ""


class Blocks:
    """Add the content of an answer's blocks to ``joined``; each block has an index of the provider."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._calls = ToolCalls()
        self._open: dict[object, _Block] = {}

    def start(self, index: object, fields: dict[str, Any]) -> None:
        """Begin a block; end a block that is still open under the same index.

        Raises:
            ValueError: too many blocks are open.
        """
        self.stop(index)
        if len(self._open) >= _BLOCKS:
            raise ValueError(f"more than {_BLOCKS} content blocks are open")
        kind = str(fields.get("type") or "")
        block = self._open[_key(index)] = _Block(kind, fields)
        match kind:
            case "tool_use":
                for fragment in self._calls.take(0, index, fields.get("id"), fields.get("name"), ""):
                    self._joined.tool_call(fragment)
            case "text":
                self._text(fields)
            case "thinking":
                if isinstance(thinking := fields.get("thinking"), str) and thinking:
                    self._joined.text(Reasoning, thinking)
                if isinstance(signature := fields.get("signature"), str):
                    block.signature = signature
            case "redacted_thinking":
                if isinstance(data := fields.get("data"), str) and data:
                    self._joined.add(SignaturePart(Signature(kind=kind, data=data)))

    def json(self, index: object, fragment: str) -> None:
        """Add a fragment of a block's input."""
        block = self._open.get(_key(index))
        if block is None or block.kind == "tool_use":
            for call in self._calls.take(0, index, None, None, fragment):
                self._joined.tool_call(call)
            if block is not None:
                block.size += len(fragment)
        elif block.size <= JSON_BYTES:
            block.size += len(fragment)
            block.json.append(fragment)

    def sign(self, index: object, signature: str) -> None:
        """Add a fragment of a thinking block's signature."""
        block = self._open.get(_key(index))
        if block is None:
            self._joined.add(SignaturePart(Signature(kind="thinking", data=signature)))
        elif len(block.signature) <= JSON_BYTES:
            block.signature += signature

    def extend(self, index: object, delta: dict[str, Any]) -> None:
        """Add a delta of an unknown kind: append its texts to the block's, replace all other fields."""
        block = self._open.get(_key(index))
        if block is None or block.kind in ("text", "thinking", "tool_use"):
            self._joined.add(ExtraPart(Extra(kind=str(delta.get("type")), data=delta)))
            return
        for name, value in delta.items():
            known = block.fields.get(name)
            if name == "type":
                continue
            if isinstance(value, str) and isinstance(known, str):
                block.size += len(value)
                block.fields[name] = known + value if block.size <= JSON_BYTES else known
            else:
                block.fields[name] = value

    def stop(self, index: object, *, cut: bool = False) -> None:
        """End the block that is open under ``index``, if any; ``cut``: the answer was cut off there."""
        block = self._open.pop(_key(index), None)
        if block is None:
            return
        match block.kind:
            case "tool_use":
                self._end_call(index, block, cut)
            case "thinking":
                if block.signature:
                    self._joined.add(SignaturePart(Signature(kind="thinking", data=block.signature)))
            case "text" | "redacted_thinking":
                pass
            case kind:
                self._keep(kind, block)

    def stop_all(self, *, cut: bool = False) -> None:
        """End all open blocks."""
        for index in list(self._open):
            self.stop(index, cut=cut)

    def _text(self, fields: dict[str, Any]) -> None:
        if isinstance(text := fields.get("text"), str) and text:
            self._joined.text(Text, text)
        citations = fields.get("citations")
        for citation in citations if isinstance(citations, list) else ():
            self._joined.add(AnnotationPart(annotation(citation)))

    def _end_call(self, index: object, block: _Block, cut: bool) -> None:
        """End a call. Some servers send its whole input in the block's start."""
        given = block.fields.get("input")
        if given and not block.size:
            fragments = self._calls.take(0, index, None, None, given)
        else:
            fragments = [] if cut else self._calls.end(0, index)
        for fragment in fragments:
            self._joined.tool_call(fragment)

    def _keep(self, kind: str, block: _Block) -> None:
        """Store a block unchanged."""
        if block.size > JSON_BYTES:
            self._joined.add(Omitted(kind, f"larger than {JSON_BYTES} bytes"))
            return
        fields = block.fields
        if block.json:
            text = "".join(block.json)
            try:
                fields = {**fields, "input": msgspec.json.decode(text)}
            except (ValueError, RecursionError):
                fields = {**fields, "input": text}
        self._joined.add(ExtraPart(Extra(kind=kind or "content_block", data=fields)))


def _key(index: object) -> object:
    return index if isinstance(index, int | str | None) else repr(index)
