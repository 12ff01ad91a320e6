"""Start a service with a planted bug, to show that the checker finds it.

``python -m bench.chaos.planted BUG services.producer``. The product itself has no switch for these bugs.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any, Final

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import Header
from schemas.events import TERMINAL_TYPES

__all__ = ["BUGS", "main"]


def _acceptance() -> None:
    """Let readers accept every event in the log."""

    def offer(self: Acceptance, header: Header, at: int = 0) -> Verdict:
        self.through = at
        self.epoch, self.next_seq = max(header.epoch, self.epoch), max(header.seq + 1, self.next_seq)
        self.ended = self.ended or header.type in TERMINAL_TYPES
        return Verdict.ACCEPTED

    Acceptance.offer = offer  # type: ignore[method-assign]  # the bug


def _go_back_n() -> None:
    """Let publishers treat events without a timely acknowledgement as stored, and never repeat them.

    The producer also skips its comparison with the log, which would restart the answer.
    """
    from services.producer.adapters.publisher import LogWriter
    from services.producer.relay import Relay

    def go_back(self: Any, now: float) -> None:
        while self._window:
            self.acknowledge(self._run, self._base)
        self.progress_at = now

    async def has_lost(self: Any, *, whole: bool) -> bool:
        return False

    LogWriter.go_back = go_back  # type: ignore[method-assign]  # the bug
    Relay._has_lost = has_lost  # type: ignore[method-assign]  # the bug


def _takeover() -> None:
    """Let a producer that takes over a generation append unconditionally, in the existing epoch."""
    from services.producer import relay
    from services.producer.adapters.publisher import LogWriter

    journal = relay.Relay._journal

    def same_epoch(self: Any, begun: Any, _epoch: int, writer: LogWriter) -> Any:
        return journal(self, begun, max(1, begun.position.epoch), writer)

    async def publish_first(self: Any, data: bytes, last_seq: int) -> None:
        await self._broker.publish_stored(self._subject, data)

    relay.Relay._journal = same_epoch  # type: ignore[assignment, method-assign]  # the bug
    LogWriter.publish_first = publish_first  # type: ignore[method-assign]  # the bug


BUGS: Final[dict[str, Callable[[], None]]] = {
    "acceptance": _acceptance,
    "go_back_n": _go_back_n,
    "takeover": _takeover,
}


def main() -> None:
    """Plant the bug and run the module in its place."""
    bug, module = sys.argv[1:3]
    BUGS[bug]()
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
