"""Background polls of a producer."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.producer.errors import ProducerError

__all__ = ["poll_every"]

log = structlog.get_logger()


async def poll_every(seconds: float, broker: Broker, poll: Callable[[], Awaitable[None]], failure: str) -> None:
    """Call ``poll`` every ``seconds`` while the broker is connected, until cancelled.

    ``failure``: the log message for a poll that raised `BrokerUnavailable` or `ProducerError`; the next one follows.
    """
    while True:
        await asyncio.sleep(seconds)
        if not broker.is_connected:
            continue
        try:
            await poll()
        except (BrokerUnavailable, ProducerError) as error:
            log.warning(failure, detail=str(error))
