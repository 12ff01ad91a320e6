"""Accept WebSockets: several sessions over one connection, with credit, starts and cancellations."""

import asyncio
from typing import Any

import structlog

from services.delivery import metrics
from services.delivery.consumers.registry import Consumers
from services.delivery.fanout.feed import LAST_WRITE_SECONDS
from services.delivery.fanout.outbox import Outbox
from services.delivery.fanout.streams import Streams
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.formats.websocket import Formats, message_size
from services.delivery.formats.websocket_messages import JSON, SUBPROTOCOLS, Dialect
from services.delivery.requests.intake import Intake
from services.delivery.settings import Settings
from services.delivery.websocket.connection import CLOSES, Connection, SocketContext
from services.kit.auth.principal import principal_of
from services.kit.clock import Clock
from services.kit.http import RAW_SEND
from services.kit.problem import Problem, send_problem
from services.kit.request_head import BodyLimit

__all__ = ["WebSockets"]

log = structlog.get_logger()


class WebSockets:
    """Serve ``GET /v1/ws`` as a raw ASGI application."""

    def __init__(
        self,
        clock: Clock,
        supervisor: Supervisor,
        settings: Settings,
        streams: Streams,
        intake: Intake,
        consumers: Consumers,
        max_message: BodyLimit,
    ) -> None:
        self._supervisor = supervisor
        self._context = SocketContext(clock, supervisor, settings.heartbeat, streams, intake, consumers, max_message)
        self._formats = {name: Formats(Dialect(name)) for name in SUBPROTOCOLS}
        self._open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one socket to its end, or reject it with problem details."""
        if scope["type"] == "http":
            upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
            problem = Problem(426, "this path accepts only WebSockets", slug="upgrade-required", headers=upgrade)
            await send_problem(send, problem)
            return
        send = scope.get(RAW_SEND, send)
        await receive()  # the ``websocket.connect`` message
        try:
            principal = principal_of(scope)
            self._supervisor.check(principal)
            name = _subprotocol(scope["subprotocols"])
        except Problem as problem:
            await send_problem(send, problem, "websocket.http")
            return
        await send({"type": "websocket.accept", "subprotocol": name})
        async with Outbox(send, message_size) as outbox:
            connection = Connection(self._context, principal, self._formats[name or JSON], outbox)
            with self._supervisor.supervise(principal, connection):
                reason = await self._serve(connection, receive)
        metrics.SOCKETS_CLOSED.labels(reason).inc()
        if reason in CLOSES:
            code, why = CLOSES[reason]
            why = why.format(*self._context.max_message)
            await _close(send, code, why, 0.5 if reason == "evicted" else LAST_WRITE_SECONDS)

    async def _serve(self, connection: Connection, receive: Any) -> str:
        self._open += 1
        metrics.SOCKETS.set(self._open)
        reason = "failed"
        try:
            reason = await connection.run(receive)
        except Exception:
            log.exception("socket failed")
        finally:
            try:
                await connection.end(reason)
            finally:
                await connection.abandon()
                self._open -= 1
                metrics.SOCKETS.set(self._open)
        return reason


def _subprotocol(offered: list[str]) -> str | None:
    """Return the first supported subprotocol offered, or None, which means JSON, when none was offered.

    Raises:
        Problem: 400, all offered subprotocols are unknown.
    """
    known = [name for name in offered if name in SUBPROTOCOLS]
    if offered and not known:
        shown = ", ".join(offered)[:100]
        detail = f"subprotocol {shown!r} is not supported: offer {' or '.join(SUBPROTOCOLS)}, or none"
        raise Problem(400, detail, slug="unknown-subprotocol")
    return known[0] if known else None


async def _close(send: Any, code: int, why: str, seconds: float) -> None:
    """Close the socket; wait at most ``seconds`` for a client that does not read."""
    closing = asyncio.create_task(_send(send, {"type": "websocket.close", "code": code, "reason": why}))
    await asyncio.wait({closing}, timeout=seconds)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)


async def _send(send: Any, message: Any) -> None:
    await send(message)
