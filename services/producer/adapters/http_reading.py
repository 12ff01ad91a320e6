"""aiohttp connections without the library's needless work for each chunk."""

import asyncio
import functools
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

__all__ = ["StreamConnector"]


class _Handler(ResponseHandler):
    """A connection that resumes reading only after it was paused.

    The library (3.14) resumes after every chunk read; each time it feeds nothing to its parser and calls the transport,
    which raises. That is an eighth of the cost of a token in the producer. The contract is tested by
    ``tests/integration/producer/test_http_upstream.py``.
    """

    def resume_reading(self, *arguments: Any, **options: Any) -> None:
        if self._reading_paused:
            super().resume_reading(*arguments, **options)


class StreamConnector(aiohttp.TCPConnector):
    """A TCP connector with connections that read many small chunks cheaply. Create it in a running event loop."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = functools.partial(_Handler, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # narrower
