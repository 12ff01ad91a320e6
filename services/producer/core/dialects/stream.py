"""Base of the dialects' parsers: bytes to events to parts, until the answer ends."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final, Generic, TypeVar

import msgspec

from services.producer.core.dialects.failures import cut_off, empty, failure_in_stream, malformed, quoted
from services.producer.core.dialects.framing import Framing, documents
from services.producer.core.dialects.halves import Halves
from services.producer.core.dialects.joined import Joined
from services.producer.core.dialects.leniency import dumped, fitted, loads, plain, shape_of
from services.producer.core.dialects.reported import reported
from services.producer.core.parts import Alive, End, NoticePart, Part, UpstreamFailure
from services.producer.core.sse import COMMENT, STRAY, OversizedEvent

__all__ = ["FAILED_REASONS", "MALFORMED_FIELDS", "UNKNOWN_EVENT", "EventParser"]

MALFORMED_FIELDS: Final = "upstream_malformed_fields"
UNKNOWN_EVENT: Final = "upstream_unknown_event"
FAILED_REASONS: Final = frozenset(
    {
        "abort",
        "engine_error",
        "error",
        "failed",
        "insufficient_system_resource",
        "internal_error",
        "network_error",
        "timeout",
    }
)
"""Finish reasons, in lower case, of answers that have failed."""
_PINGS: Final = ("ping", "heartbeat", "keepalive", "keep-alive", "keep_alive")
_DONE: Final = b"[DONE]"
_REST_LIMIT: Final = 2_000
"""Bytes of input outside of events that are kept for the message of a failure."""
_LONGEST_ARRAY: Final = 10_000
"""Bound of the events in one array, so that one read does not take seconds."""
_LF: Final = 0x0A  # first byte of the names of input that is not an event
_ERRORS: Final = (b"error", b"errors", b"exception")
E = TypeVar("E")


class EventParser(ABC, Generic[E]):
    """Pass each event to `read`, which adds parts to ``joined`` and calls `end` at the end marker.

    Events are decoded strictly as ``event_type``; a rejected event is read leniently: fields of a wrong type are
    converted, or omitted with a notice unless they are part of the answer itself. No input is dropped silently: an
    error of any shape ends the answer as failed; an unknown event or line becomes a notice, one per code.
    """

    __slots__ = (
        "_closing",
        "_decode",
        "_ended",
        "_framing",
        "_has_lines",
        "_noticed",
        "_notices",
        "_rest",
        "_trailing",
        "_truncated",
        "joined",
    )

    event_type: ClassVar[type]
    done_is_marker: ClassVar[bool] = False

    def __init__(self, decoder: "msgspec.json.Decoder[E]") -> None:
        self._decode = decoder.decode
        self._framing = Framing()
        self._ended = False
        self._closing = False
        self._rest = b""
        self._trailing = False
        self._truncated = False
        self._has_lines = False
        self._notices: list[NoticePart] = []
        self._noticed: set[str] = set()
        self.joined = Joined()

    @abstractmethod
    def read(self, event: E, payload: bytes) -> None:
        """Handle one event. ``payload``: its JSON.

        Raises:
            ValueError: the event does not belong to the dialect.
        """

    @abstractmethod
    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the stream events equivalent to a whole answer; none if ``tree`` is not one."""

    def end(self, part: End | UpstreamFailure) -> None:
        """Add the last part; ignore all later input.

        An end marker without content fails; so does one after text outside of events, without a finish reason.
        """
        self._ended = True
        joined = self.joined
        joined.release()
        if isinstance(part, End):
            if not (joined.begun or joined.finished or joined.has_usage):
                part = empty(self._rest)
            elif self._has_lines and not joined.finished >= joined.begun:
                part = cut_off(self._rest)
        joined.add(part)

    def feed(self, data: bytes) -> list[Part]:
        """Return the parts that ``data`` completes, adjacent fragments of one kind joined."""
        if self._ended:
            return []
        try:
            events = self._framing.feed(data)
        except OversizedEvent as error:
            self.end(malformed(error))
            events = []
        self._take(events)
        if self._notices or self.joined.halves is not None:
            return self._taken()
        return self.joined.take()

    def finish(self, broken: str = "") -> list[Part]:
        """Return the remaining parts at the end of the body, with the end or a failure as the last one.

        ``broken``: why the connection broke; empty if the body ended properly. Only then does a finish reason for each
        choice end the answer without its end marker.
        """
        if self._ended:
            return []
        self._closing = True
        self._take(self._framing.finish())
        if not self._ended:
            self._end_with_body(broken)
        return self._taken()

    def unknown(self, payload: bytes) -> None:
        """Handle an unknown event: an error, a whole answer, or an irregularity for a notice."""
        tree = loads(payload)
        if not isinstance(tree, dict):
            raise ValueError("an event is no object")
        error = reported(tree)
        if error is not None:
            self.end(failure_in_stream(tree))
        elif any(
            isinstance(tree.get(name), str) and tree[name].lower() in _PINGS for name in ("type", "event", "object")
        ):
            self.joined.add(Alive())
        elif not self._take_whole(payload):
            self._remember(payload)
            self.notice(UNKNOWN_EVENT, f"an unknown event was skipped: {quoted(payload)}")

    def _take_whole(self, payload: bytes) -> bool:
        """Handle a whole answer event by event; return whether ``payload`` is one."""
        events = self.whole(loads(payload))
        for event in events:
            if not self._ended:
                self._fit(event)
        return bool(events)

    def notice(self, code: str, message: str) -> None:
        """Add a notice, unless there was one with this code."""
        if code not in self._noticed:
            self._noticed.add(code)
            self._notices.append(NoticePart(code, message))

    def _taken(self) -> list[Part]:
        parts = self.joined.take()
        if self._notices:
            # the last part or directly before the ending, as `Parser.feed` promises
            at = len(parts) - self._ended
            parts[at:at] = self._notices
            self._notices = []
        return parts if self.joined.halves is None else [_encodable(part) for part in parts]

    def _take(self, events: list[tuple[bytes, bytes]]) -> None:
        decode = self._decode
        for name, payload in events:
            if name and (name[0] == _LF or b"error" in name.lower()):
                self._named(name, payload)
            elif payload:
                try:
                    event = decode(payload)
                except (ValueError, RecursionError) as error:
                    self._read_leniently(payload, error)
                else:
                    try:
                        self.read(event, payload)
                    except (ValueError, RecursionError) as error:
                        self.end(malformed(error, payload))
            if self._ended:
                break

    def _named(self, name: bytes, payload: bytes) -> None:
        """Handle input identified by its name: comments, lines outside of events, and events named as errors."""
        if name == COMMENT:
            self.joined.add(Alive())
        elif name == STRAY:
            self._read_stray(payload)
        else:
            self.end(failure_in_stream(_value(payload)))

    def _read_leniently(self, payload: bytes, error: Exception) -> None:
        """Handle an event that the strict decoder rejects."""
        if payload.strip().upper() == _DONE:
            self._done()
            return
        try:
            tree = loads(payload)
        except (ValueError, RecursionError):
            lines = payload.split(b"\n")
            if len(lines) > 1:
                self._take([(b"", line) for line in lines if line.strip()])
            else:
                self._unreadable(payload, error)
            return
        if isinstance(tree, list) and 0 < len(tree) <= _LONGEST_ARRAY and all(isinstance(item, dict) for item in tree):
            self._take([(b"", dumped(item)) for item in tree])
        elif isinstance(tree, dict):
            self._fit(tree, error)
        elif tree is not None:
            self._unreadable(payload, error)

    def _fit(self, tree: dict[str, Any], error: Exception | None = None) -> None:
        """Handle an event whose fields have other types than in the dialect."""
        try:
            event, payload, left_out, halves = fitted(tree, self.event_type, shape_of(self.event_type))
            if halves and self.joined.halves is None:
                self.joined.halves = Halves()
            self.read(event, payload)
        except (ValueError, RecursionError) as misfit:
            if reported(tree) is not None:
                self.end(failure_in_stream(tree))
            else:
                self.end(malformed(error or misfit, dumped(tree)))
            return
        if left_out:
            self.notice(MALFORMED_FIELDS, f"fields of an unexpected type were omitted: {', '.join(left_out[:5])}")

    def _read_stray(self, text: bytes) -> None:
        """Handle lines that are not an event: JSON without framing, ``error:`` lines, or text."""
        if text.lstrip().startswith((b"{", b"[")):
            events = documents(text)
            if events[0][0] != STRAY:
                self._take(events)
                return
        for line in text.split(b"\n"):
            if not self._ended:
                self._stray_line(line)

    def _stray_line(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        field, value = field.strip().lower(), value.strip()
        if field in _ERRORS or (field == b"event" and b"error" in value.lower()):
            self.end(failure_in_stream(_value(value)))
        elif field == b"event":
            self.joined.add(Alive())
        elif field == b"data":
            self._take([(b"", value)])
        elif line.strip() == _DONE:
            self._done()
        elif line.strip():
            self._keep(line)
            if self._closing:
                self._truncated = self._truncated or line.lstrip().startswith((b"{", b"["))
            else:
                self.notice(UNKNOWN_EVENT, f"a line that is not an event was skipped: {quoted(line)}")

    def _done(self) -> None:
        if self.done_is_marker:
            self.end(End())
        else:
            self._end_with_body("")

    def _end_with_body(self, broken: str) -> None:
        """End the answer at the end of its body."""
        joined = self.joined
        answered = bool(joined.begun or joined.finished or joined.has_usage)
        if joined.finished >= joined.begun and joined.finished and not broken and not self._trailing:
            self.end(End())
        else:
            rest = self._rest or (b"" if answered else self._framing.head)
            instead = not answered and not (broken or self._truncated)
            self.end(cut_off(rest, broken, instead))

    def _keep(self, rest: bytes) -> None:
        """Keep input outside of events; after a finish reason it replaces the end marker."""
        self._has_lines = True
        self._trailing = self._trailing or self._closing or bool(self.joined.finished)
        self._remember(rest)

    def _remember(self, rest: bytes) -> None:
        """Keep unreadable input for the message of a failure."""
        if len(self._rest) < _REST_LIMIT:
            self._rest = (self._rest + b"\n" + rest[:_REST_LIMIT]).strip()

    def _unreadable(self, payload: bytes, error: Exception) -> None:
        if self._closing:
            self._truncated = True
            self._keep(payload)
        else:
            self.end(malformed(error, payload))


def _value(payload: bytes) -> Any:
    """Return the JSON value of an error line, or its text."""
    try:
        return loads(payload)
    except (ValueError, RecursionError):
        return payload.decode(errors="replace")


def _encodable(part: Part) -> Part:
    """Return a part whose texts, where they are not joined, have no halves of surrogate pairs."""
    try:
        msgspec.json.encode(part)
    except UnicodeEncodeError:
        return msgspec.convert(plain(msgspec.to_builtins(part)), type(part))
    return part
