"""Start the process tree of ``tailrace up`` in order, keep it running, and stop it in order."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

from services.kit.tasks import first_of
from services.standalone.errors import CommandFailed, StartFailed
from services.standalone.member import Member
from services.standalone.plan import ServiceSpec

__all__ = ["Supervisor"]

QUIET_SECONDS: Final = 0.5
"""Seconds of stopping after which the terminal lists the services that are still running."""


class Supervisor:
    """Run services until `stop` is called or one of them cannot be kept running.

    ``notify`` shows a line on the terminal. ``logs``: an existing folder. ``before_start`` is called before each start
    of a process.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        logs: Path,
        notify: Callable[[str], None],
        before_start: Callable[[ServiceSpec], None] = lambda _spec: None,
    ) -> None:
        self._notify = notify
        self._ending = asyncio.Event()
        self._lost: list[str] = []
        self._members = [Member(spec, logs, notify, self._on_lost, before_start) for spec in specs]
        self._tasks: dict[Member, asyncio.Task[None]] = {}

    async def run(
        self,
        on_ready: Callable[[], None],
        on_brokers: Callable[[], Awaitable[None]] | None = None,
        while_ready: Callable[[], Coroutine[None, None, None]] | None = None,
    ) -> None:
        """Start all services, call ``on_ready``, and return when all have been stopped.

        ``on_brokers`` is awaited when the first phase is ready; ``while_ready`` runs while all services are ready.

        Raises:
            StartFailed: a service did not become ready.
            CommandFailed: a service crashed too often or could not be restarted.
        """
        async with asyncio.TaskGroup() as group:
            started = await self._start(group, on_brokers)
            if started:
                on_ready()
            watch = group.create_task(while_ready()) if started and while_ready is not None else None
            await self._ending.wait()
            if watch is not None:
                watch.cancel()
            await self._stop_all()
        if self._lost:
            raise (CommandFailed if started else StartFailed)("\n".join(self._lost))

    def stop(self) -> None:
        """Stop all services in order; kill them at once on the second call."""
        if self._ending.is_set():
            for member in self._tasks:
                member.kill()
            return
        self._ending.set()
        self._notify("stopping (Ctrl-C again to stop at once)")

    def stop_on_signals(self) -> None:
        """Let SIGINT, SIGTERM and SIGHUP (a closed terminal) call `stop`. Needs a running event loop."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self.stop)

    @property
    def pids(self) -> dict[str, int]:
        """Return the process ids of the running services by name."""
        return {member.spec.name: member.pid for member in self._members if member.pid is not None}

    async def restart(self, names: Sequence[str]) -> None:
        """Restart the named services, one after another."""
        for member in self._members:
            if member.spec.name in names and not self._ending.is_set():
                await member.restart()

    def _on_lost(self, reason: str) -> None:
        self._lost.append(reason)
        self._ending.set()

    async def _start(self, group: asyncio.TaskGroup, on_brokers: Callable[[], Awaitable[None]] | None) -> bool:
        """Start the services phase by phase; return whether all became ready before a stop."""
        for phase in sorted({member.spec.start_phase for member in self._members}):
            members = [member for member in self._members if member.spec.start_phase == phase]
            for member in members:
                self._tasks[member] = group.create_task(member.run(), name=member.spec.name)
            for member in members:
                if not await self._until_ready(member):
                    return False
            if phase == 0 and on_brokers is not None:
                await on_brokers()
        return True

    async def _until_ready(self, member: Member) -> bool:
        await first_of(None, member.ready.wait(), self._ending.wait())
        return not self._ending.is_set()

    async def _stop_all(self) -> None:
        for phase in sorted({member.spec.stop_phase for member in self._tasks}):
            stopping = {m: task for m, task in self._tasks.items() if m.spec.stop_phase == phase}
            for member in stopping:
                member.stop()
            await asyncio.wait(stopping.values(), timeout=QUIET_SECONDS)
            left = [member.spec for member, task in stopping.items() if not task.done()]
            if left:
                names, grace = ", ".join(spec.name for spec in left), max(spec.grace for spec in left)
                self._notify(f"waiting for {names}, {grace:g} s at most (Ctrl-C again to stop at once)")
            await asyncio.gather(*stopping.values(), return_exceptions=True)
