"""What one connection is to bring, and whom to tell."""

from collections.abc import Callable
from typing import Final, NamedTuple

import aiohttp
import grpc
from websockets.exceptions import WebSocketException

from bench.chaos.history import Got

__all__ = ["AWAY", "SILENCE", "Refused", "Wanted"]

SILENCE: Final = 4.0
"""Seconds without even a heartbeat after which a subscriber tries elsewhere, on a quiet machine."""
AWAY: Final = (aiohttp.ClientError, OSError, TimeoutError, EOFError, WebSocketException, grpc.aio.AioRpcError)


class Refused(Exception):
    """The service says no, by a status of HTTP."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(f"{status} {detail}")


class Wanted(NamedTuple):
    """``url`` and ``call`` are the addresses for HTTP and gRPC. ``opened`` takes the status of the answer, ``got`` an
    event, ``said`` what is no event, and ``over`` is called when nothing follows; ``there`` tells whether to leave.
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
