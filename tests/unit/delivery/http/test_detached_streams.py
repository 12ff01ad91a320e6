"""Test detached streams: a started stream continues without the application's scope."""

import gc
import weakref
from typing import Any

import pytest

from services.delivery.http.asgi import RESTS, detaching_streams


class Known:
    """Something that a request needed until its stream began."""


async def receive() -> Any:
    return {"type": "http.disconnect"}


async def test_a_detached_stream_outlives_the_application_and_its_scope() -> None:
    sent: list[Any] = []
    alive: list[weakref.ref[Known]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        known = Known()
        scope["known"] = known
        alive.append(weakref.ref(known))
        await send("head")

        async def rest(receive_: Any, send_: Any) -> None:
            gc.collect()
            assert receive_ is receive
            await send_(f"body, {alive[0]()} left")

        scope[RESTS].append(rest)

    await detaching_streams(app)({"type": "http"}, receive, send)
    assert sent == ["head", "body, None left"]


async def test_no_stream_is_detached_from_a_failed_application() -> None:
    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        async def rest(_receive: Any, _send: Any) -> None:
            pytest.fail("must not be reached")

        scope[RESTS].append(rest)
        raise KeyError("x")

    with pytest.raises(KeyError):
        await detaching_streams(app)({"type": "http"}, receive, receive)
