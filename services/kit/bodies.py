"""Request bodies, read before they are answered.

A server that refuses a body while it is still being sent closes the connection under its client, which then sees a
reset instead of the refusal. So what is too large, or comes from whom nobody knows, is read to its end, within bounds,
and thrown away.
"""

import asyncio
import contextlib
from typing import Any, Final

from services.kit.auth.principal import PRINCIPAL
from services.kit.problem import Problem, send_problem

__all__ = ["reading_bodies"]

DRAIN_BYTES: Final = 64 * 1024 * 1024
DRAIN_SECONDS: Final = 10.0
BODY_SECONDS: Final = 30.0
_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
_CUT_OFF: Final = Problem(400, "the body ends before its announced length")


def reading_bodies(app: Any, max_body: int, seconds: float = BODY_SECONDS) -> Any:
    """Return ``app`` (ASGI), called when the body is there: whole, or cut behind ``max_body`` bytes.

    It must be there within ``seconds``, so that nobody holds connections with bodies that never end.

    Of a request whose credentials have been refused no more than a byte is kept.
    """

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await app(scope, receive, send)
            return
        is_refused = isinstance(scope.get(PRINCIPAL), Problem)
        body = await _read(receive, 0 if is_refused else max_body, seconds)
        if isinstance(body, Problem):
            await send_problem(send, body)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        await app(scope, replay, send)

    return reading


async def _read(receive: Any, max_body: int, seconds: float) -> bytes | Problem:
    """Return the body, or one byte more than allowed when it is too large; what is wrong when it does not come."""
    kept, size, drains = bytearray(), 0, False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds) as timer:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return _CUT_OFF
                chunk = message.get("body", b"")
                size += len(chunk)
                kept += chunk[: max_body + 1 - len(kept)]
                if not message.get("more_body") or size > DRAIN_BYTES:
                    return bytes(kept)
                if size > max_body and not drains:
                    drains = True
                    timer.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
    if drains:
        return bytes(kept)
    return Problem(
        408,
        f"the body must be there within {seconds:g} seconds",
        slug="too-slow",
        title="The request takes too long",
        headers={"Connection": "close"},
    )
