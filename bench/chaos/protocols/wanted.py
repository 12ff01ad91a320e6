"""The request of one connection, and its callbacks."""

from collections.abc import Callable
from typing import Final, NamedTuple

import aiohttp
import grpc
from websockets.exceptions import WebSocketException

from bench.chaos.history import Got

__all__ = ["AWAY", "SILENCE", "Refused", "Wanted"]

SILENCE: Final = 4.0
"""Seconds without a heartbeat after which a subscriber tries another replica, on a quiet machine."""
AWAY: Final = (aiohttp.ClientError, OSError, TimeoutError, EOFError, WebSocketException, grpc.aio.AioRpcError)


class Refused(Exception):
    """The service refused the request with an HTTP status."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(f"{status} {detail}")


class Wanted(NamedTuple):
    """A connection's request and callbacks. ``url`` and ``call``: addresses for HTTP and gRPC. ``opened`` receives the
    response's status, ``got`` an event, ``said`` any other message; ``over`` is called at the end of the stream.
    ``there`` returns whether to leave.
    """

    http: aiohttp.ClientSession
    url: str
    call: str
    headers: dict[str, str]
    session: str
    generation: str | None
    cursor: str | None
    window: int | None
    opened: Callable[[int], None]
    got: Callable[[Got], None]
    said: Callable[[str, str], None]
    over: Callable[[], None]
    there: Callable[[], bool]
