"""Read request bodies before the application runs, within bounds of size and time."""

import asyncio
from typing import Any, Final

from services.kit.auth.principal import PRINCIPAL
from services.kit.problem import Problem, send_problem
from services.kit.request_head import BodyLimit

__all__ = ["BODIES_BYTES", "reading_bodies"]

BODY_SECONDS: Final = 30.0
LEAST_RATE: Final = 65_536
"""Bytes a second that a client must reach on top of `BODY_SECONDS`."""
BODIES_BYTES: Final = 128 * 1024 * 1024
"""Bound of all bodies being held in one process, at least two of the largest."""
_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
_CUT_OFF: Final = Problem(400, "the body ends before its announced length")
_BUSY: Final = Problem(503, "too many large requests are under way", headers={"Retry-After": "1"})


def reading_bodies(app: Any, limit: BodyLimit, seconds: float = BODY_SECONDS, total: int = BODIES_BYTES) -> Any:
    """Wrap ``app`` (ASGI), to be called when the body is complete.

    A body larger than ``limit`` is rejected without further reading, and so is one that is not complete within
    ``seconds`` and a second more for each `LEAST_RATE` bytes, so that endless bodies cannot hold connections. ``total``
    bounds the bytes of all bodies together. The body of a request with refused credentials is not read.
    """
    bodies = _Bodies(limit, seconds, max(total, 2 * limit.size))

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in _METHODS or isinstance(scope.get(PRINCIPAL), Problem):
            await app(scope, receive, send)
            return
        body = await bodies.read(receive)
        if isinstance(body, Problem):
            await send_problem(send, body)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        size = len(body)
        del body  # streams last for hours and must not keep their request's body

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        try:
            await app(scope, replay, send)
        finally:
            bodies.size -= size

    return reading


class _Bodies:
    """All bodies being held; ``size``: their total bytes."""

    def __init__(self, limit: BodyLimit, seconds: float, total: int) -> None:
        self._limit = limit
        self._seconds = seconds
        self._total = total
        self.size = 0

    async def read(self, receive: Any) -> bytes | Problem:
        """Return a body, whose bytes are added to ``size``, or the problem with it."""
        kept = bytearray()
        found: Problem | None = _CUT_OFF
        try:
            found = await self._fill(kept, receive)
        finally:
            if found is not None:
                self.size -= len(kept)
        return bytes(kept) if found is None else found

    async def _fill(self, kept: bytearray, receive: Any) -> Problem | None:
        try:
            async with asyncio.timeout(self._seconds) as timer:
                start = asyncio.get_running_loop().time()
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _CUT_OFF
                    chunk = message.get("body", b"")
                    if len(kept) + len(chunk) > self._limit.size:
                        return self._limit.exceeded()
                    if self.size + len(chunk) > self._total:
                        return _BUSY
                    kept += chunk
                    self.size += len(chunk)
                    if not message.get("more_body"):
                        return None
                    timer.reschedule(start + self._seconds + len(kept) / LEAST_RATE)
        except TimeoutError:
            return Problem(
                408,
                f"the body must arrive within {self._seconds:g} seconds, and a second for each {LEAST_RATE} bytes",
                slug="too-slow",
                title="The request takes too long",
                headers={"Connection": "close"},
            )
