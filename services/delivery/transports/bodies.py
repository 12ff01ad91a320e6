"""Request bodies, read before they are answered.

A server that refuses a body while it is still being sent closes the connection under its client, which then sees a
reset instead of the refusal. So what is too large is read to its end, within bounds, and thrown away.
"""

import asyncio
import contextlib
from typing import Any, Final

from services.kit.problem import Problem, problem_bytes

__all__ = ["reading_bodies"]

DRAIN_BYTES: Final = 64 * 1024 * 1024
DRAIN_SECONDS: Final = 10.0
_CUT_OFF: Final = Problem(400, "the body ends before its announced length")


def reading_bodies(app: Any, max_body: int) -> Any:
    """Return ``app`` (ASGI), called for a POST when its body is there: whole, or cut behind ``max_body`` bytes."""

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        body = await _read(receive, max_body)
        if body is None:
            await _refuse(send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        await app(scope, replay, send)

    return reading


async def _read(receive: Any, max_body: int) -> bytes | None:
    """Return the body, one byte more than allowed when it is too large, and ``None`` when the client breaks it off."""
    kept, size = bytearray(), 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as timer:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                kept += chunk[: max_body + 1 - len(kept)]
                if not message.get("more_body") or size > DRAIN_BYTES:
                    break
                if size > max_body and timer.when() is None:
                    timer.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
    return bytes(kept)


async def _refuse(send: Any) -> None:
    body = problem_bytes(_CUT_OFF)
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": _CUT_OFF.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
