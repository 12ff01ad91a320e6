"""Print events for a person."""

from schemas.events import (
    Annotation,
    AnyEvent,
    Binary,
    Cancelled,
    Completed,
    Delta,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Started,
    ToolCall,
)
from services.standalone.errors import EXIT_CANCELLED, EXIT_FAILED, EXIT_OK
from services.standalone.follow import Received
from services.standalone.terminal import Terminal

__all__ = ["Screen", "exit_code"]


def exit_code(type_: str) -> int:
    """Return the exit code of a command whose generation ended with this terminal event."""
    return {"completed": EXIT_OK, "cancelled": EXIT_CANCELLED}.get(type_, EXIT_FAILED)


class Screen:
    """Show the events of a session, one generation after the other.

    The answer goes to standard output, everything else through `Terminal.aside` or to standard error. With ``json``
    events are printed as stored, one per line. ``headings`` prints the name of each generation as it starts. Only the
    first of several choices is shown.
    """

    def __init__(self, terminal: Terminal, *, json: bool = False, headings: bool = False) -> None:
        self._terminal = terminal
        self._json = json
        self._headings = headings
        self._mode = ""
        self._open_line = False
        self._file: tuple[str, int] | None = None  # media type and size

    def show(self, received: Received) -> None:
        """Show one accepted event."""
        if self._json:
            self._terminal.show(received.data)
        elif received.event is not None:
            self._show(received.event)

    def close(self) -> None:
        """Show the pending file, and end an open line."""
        if self._file is not None:
            (media_type, size), self._file = self._file, None
            self._put("file", f"[{media_type}, {size:,} bytes]")
        if self._open_line:
            (self._terminal.write if self._mode == "text" else self._terminal.aside)("\n")
        self._open_line, self._mode = False, ""

    def _show(self, event: AnyEvent) -> None:
        match event:
            case Started():
                if self._headings:
                    self._notify(f"── {event.generation} · {event.model} ──")
            case Delta():
                self._show_delta(event)
            case Notice():
                self._notify(event.message or event.code)
            case Restarted():
                self._notify(f"↻ the answer begins again ({event.reason}): the text above is void")
            case Completed() | Failed() | Cancelled() | Interrupted():
                self._end(event)
            case _:
                pass

    def _show_delta(self, delta: Delta) -> None:
        if delta.choice != 0:
            return
        if delta.text:
            self._put("text", delta.text)
        if delta.reasoning:
            self._put("reasoning", delta.reasoning)
        if delta.tool_call:
            self._show_tool_call(delta.tool_call)
        if delta.refusal:
            self._put("text", delta.refusal)
        if delta.binary:
            self._show_binary(delta.binary)
        if delta.annotation:
            self._show_source(delta.annotation)
        if delta.extra:
            self._notify(f"[{delta.extra.kind}]")

    def _show_binary(self, binary: Binary) -> None:
        """Add a piece to the pending file, which is shown with its total size before the next other output."""
        if not binary.continues or self._file is None:
            self.close()
            self._file = (binary.media_type, 0)
        media_type, size = self._file
        self._file = (media_type, size + len(binary.data))

    def _show_source(self, source: Annotation) -> None:
        mark = "" if source.number is None else f"[{source.number}] "
        named = " · ".join(part for part in (source.title, source.url) if part)
        self._notify(f"{mark}{named or source.quote or source.kind}")

    def _show_tool_call(self, call: ToolCall) -> None:
        if call.name:
            self.close()
            self._put(f"tool {call.index}", f"→ {call.name} ")
        self._put(f"tool {call.index}", call.arguments)

    def _put(self, mode: str, text: str) -> None:
        if mode != self._mode or self._file is not None:
            self.close()
            self._mode = mode
        (self._terminal.write if mode == "text" else self._terminal.aside)(text)
        self._open_line = not text.endswith("\n") if text else self._open_line

    def _notify(self, line: str) -> None:
        self.close()
        self._terminal.remark(line)

    def _end(self, event: Completed | Failed | Cancelled | Interrupted) -> None:
        tokens = f"{event.counted.output} tokens{'' if event.counted.exact else ' (estimated)'}"
        self.close()
        match event:
            case Failed():
                hint = "; a retry may help" if event.recoverable else ""
                self._terminal.complain(f"{event.code}: {event.message or 'the generation failed'}{hint}")
            case Interrupted():
                self._terminal.complain(f"interrupted ({event.reason}) after {tokens}")
            case Cancelled():
                self._terminal.remark(f"cancelled after {tokens}")
            case Completed() if self._headings or event.finish_reason not in {"stop", "tool_calls"}:
                self._terminal.remark(f"completed ({event.finish_reason}) · {tokens}")
