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
    """Readers accept whatever the log holds."""

    def offer(self: Acceptance, header: Header, at: int = 0) -> Verdict:
        self.through = at
        self.epoch, self.next_seq = max(header.epoch, self.epoch), max(header.seq + 1, self.next_seq)
        self.ended = self.ended or header.type in TERMINAL_TYPES
        return Verdict.ACCEPTED

    Acceptance.offer = offer  # type: ignore[method-assign]  # the bug


def _go_back_n() -> None:
    """A publisher takes what was not acknowledged in time for stored, and never sends anything again.

    Nor does the producer look whether the log still has what it takes for stored: it would begin the answer anew.
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
    """A producer that takes a generation over appends unconditionally, in the epoch that is there already."""
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
