"""Stop a running generation: cancel, budget, deadline, lease loss, log loss and drain all go through one object.

The relay creates one `Interruption` for each generation and shares it with its calls. It alone cancels the relay's task
and takes a cancellation back (`asyncio.Task.uncancel`).
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

__all__ = ["Interruption", "StopKind", "StopReason", "Stopped"]

T = TypeVar("T")
StopKind = Literal["cancelled", "over_budget", "overdue", "attempt", "lease", "lost", "drain"]


class StopReason(NamedTuple):
    """Why a generation, or one call of it, is stopped. ``code``: the reason or failure code that is logged.

    ``kind``: ``cancelled``, ``over_budget``, ``overdue`` (a deadline of the generation has passed), ``attempt`` (a
    deadline of one call has passed), ``lease`` (the lease is lost), ``lost`` (the log has lost events of the
    generation) or ``drain`` (this process shuts down).
    """

    kind: StopKind
    code: str

    @property
    def allows_usage(self) -> bool:
        """Return whether to read on for the call's usage: it was stopped on purpose, without a failure."""
        return self.kind in ("cancelled", "over_budget")

    @property
    def hands_over(self) -> bool:
        """Return whether to hand the request to another producer at once."""
        return self.kind in ("drain", "lease")

    @property
    def is_of_calls(self) -> bool:
        """Return whether it ends only the current calls; the generation is then read again and makes new ones."""
        return self.kind in ("overdue", "attempt")


class Stopped(Exception):
    """The generation was interrupted, for ``reason``."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason
        super().__init__(f"{reason.kind}: {reason.code}")


class Interruption:
    """Interrupt one generation. `interrupt` may be called at any time on the same event loop.

    ``reason``: the first reason that concerns the whole generation; it holds until the generation has ended.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self._task: asyncio.Task[object] | None = None  # cancelled by `interrupt`
        self._pending: StopReason | None = None  # why the task was cancelled; `take` clears it
        self._reading: asyncio.Timeout | None = None  # around a read of the log
        self._grace: asyncio.Timeout | None = None  # around a call that is read on for its usage

    def interrupt(self, kind: StopKind, code: str) -> None:
        """Stop the generation, or with ``attempt`` the call that runs now.

        The first reason holds, except that any later one replaces ``attempt``. A later reason that leaves no time ends
        the wait for a cancelled call's usage.
        """
        reason = StopReason(kind, code)
        if self.reason is None and not reason.is_of_calls:
            self.reason = reason
            if reason.hands_over:
                _expire(self._reading)
        if reason.hands_over or kind == "lost":
            _expire(self._grace)
        if self._task is None:
            return
        before = self._pending
        if before is None or before.kind == "attempt":
            self._pending = reason
            if before is None:
                self._task.cancel()

    def resume(self) -> None:
        """Clear the reason: the generation is read again and continues from the events left in the log."""
        self.reason = None

    @contextmanager
    def covering(self) -> Iterator[None]:
        """Let `interrupt` cancel the current task while the block runs.

        Raises:
            Stopped: the generation has been interrupted before.
        """
        self._pending = None
        if self.reason is not None:
            raise Stopped(self.reason)
        self._task = asyncio.current_task()
        try:
            yield
        finally:
            self._task = None

    def take(self) -> StopReason:
        """Take back the cancellation of the covered task and return its reason. Call it in ``except CancelledError``.

        Raises:
            CancelledError: the cancellation came from elsewhere and must propagate.
        """
        reason = self._pending
        if reason is None or self._task is None:
            raise asyncio.CancelledError
        self._task.uncancel()
        self._pending = None
        return reason

    @property
    def allows_usage(self) -> bool:
        """Return whether the reason of the covered task's cancellation allows to read on for the call's usage."""
        return self._task is not None and self._pending is not None and self._pending.allows_usage

    async def postpone(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        """Await ``work`` before the pending cancellation takes effect, at most ``seconds``; always raises.

        Raises:
            CancelledError: the pending cancellation, once ``work`` has ended.
        """
        task = self._task
        assert task is not None
        # Take the cancellation back, or the timeout could not distinguish its own from it.
        task.uncancel()
        try:
            async with asyncio.timeout(seconds) as self._grace:
                await work
        except TimeoutError:
            pass
        finally:
            self._grace = None
        # Cancel again, for the caller to `take`; it is raised at the next suspension.
        task.cancel()
        await asyncio.sleep(0)

    async def reading(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a read of the log, and end it early when the request must be handed over.

        Raises:
            TimeoutError: it was ended early.
        """
        try:
            async with asyncio.timeout(None) as self._reading:
                return await work
        finally:
            self._reading = None


def _expire(timeout: asyncio.Timeout | None) -> None:
    if timeout is not None and not timeout.expired():
        timeout.reschedule(asyncio.get_running_loop().time())
