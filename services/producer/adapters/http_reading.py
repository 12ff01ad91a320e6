"""aiohttp's connections to providers, without the work that it does for every chunk although nothing waits for it."""

import asyncio
import functools
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

__all__ = ["StreamConnector"]


class _Handler(ResponseHandler):
    """A connection that is told to go on reading only when it had been told to stop.

    The library (3.14) says so after every chunk that is taken, and each time feeds its parser nothing and asks the
    transport, which raises: an eighth of what one token's way through the producer costs. The contract is held by
    ``tests/integration/test_http_upstream.py``.
    """

    def resume_reading(self, *arguments: Any, **options: Any) -> None:
        if self._reading_paused:
            super().resume_reading(*arguments, **options)


class StreamConnector(aiohttp.TCPConnector):
    """A TCP connector whose connections are cheap to read many small chunks from. Made in a running event loop."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = functools.partial(_Handler, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # narrower
