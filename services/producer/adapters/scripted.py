"""The scripted provider as an upstream: plays a script in real time."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

from services.kit.clock import Clock
from services.producer.core.dialects.joined import join
from services.producer.core.parts import Part, Text
from services.producer.core.script import Step, play, refusal
from services.producer.ports import UpstreamRefused, UpstreamRequest

__all__ = ["ScriptedStream", "ScriptedUpstream"]

_READ_LIMIT: Final = 16 * 1024
"""Characters of text in one read, about as many as in a socket read from a real provider."""


class ScriptedUpstream:
    """Implement `services.producer.ports.Upstream` without a network."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @asynccontextmanager
    async def open(self, call: UpstreamRequest) -> AsyncIterator["ScriptedStream"]:
        """Begin the script.

        Raises:
            UpstreamRefused: the script refuses the call, or does not exist.
        """
        failure = refusal(call)
        if failure is not None:
            raise UpstreamRefused(failure)
        yield ScriptedStream(play(call), self._clock)


class ScriptedStream:
    """Implement `services.producer.ports.UpstreamStream`. One read returns all steps that are due."""

    def __init__(self, steps: Iterator[Step], clock: Clock) -> None:
        self._steps = steps
        self._clock = clock
        self._due = clock.monotonic()
        self._next = self._advance()

    async def read(self) -> list[Part] | None:
        """Wait for the next step and return all that are due, or ``None`` after the last step."""
        if self._next is None:
            return None
        if math.isinf(self._due):
            await asyncio.get_running_loop().create_future()  # wait until cancelled
        # A sleep of 0 lets other tasks run even when the script is fast.
        await asyncio.sleep(max(0.0, self._due - self._clock.monotonic()))
        parts: list[Part] = []
        characters = 0
        now = max(self._clock.monotonic(), self._due)
        while self._next is not None and self._due <= now and characters < _READ_LIMIT:
            parts += self._next
            characters += sum(len(p.text) for p in self._next if isinstance(p, Text))
            self._next = self._advance()
        return join(parts)

    def _advance(self) -> list[Part] | None:
        step = next(self._steps, None)
        if step is None:
            return None
        self._due += step[0]
        return step[1]
