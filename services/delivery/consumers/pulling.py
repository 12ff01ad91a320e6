"""Pull events of a durable consumer for one connection and encode them for services."""

import asyncio
from contextlib import suppress
from typing import Any, Final

import msgspec

from services.delivery.consumers.session import ConsumerSession, Delivery
from services.kit.jetstream.broker import BrokerUnavailable

__all__ = ["PIECE_BYTES", "SLICE", "STREAM_BATCH", "about", "envelope", "pulled"]

STREAM_BATCH: Final = 200
"""Most events of one pull for a stream; their bytes are bounded by `PULL_BYTES`."""
PIECE_BYTES: Final = 65_536
SLICE: Final = 1.0
"""Longest wait of one pull in seconds; a stream checks between two pulls whether it must end."""


async def pulled(session: ConsumerSession, limit: int, wait: float, watch: asyncio.Future[Any]) -> list[Delivery]:
    """Pull events; if ``watch`` is done first, cancel the pull, which returns its events, and return none."""
    pull = asyncio.create_task(session.pull(limit, wait))
    try:
        await asyncio.wait({pull, watch}, return_when=asyncio.FIRST_COMPLETED)
        if pull.done():
            return pull.result()
        return []
    finally:
        if not pull.done():
            pull.cancel()
            with suppress(asyncio.CancelledError, BrokerUnavailable):
                await pull


def about(delivery: Delivery, *, auto: bool) -> dict[str, Any]:
    """Return the fields sent with an event; with ``auto`` without token, since services settle nothing."""
    fields: dict[str, Any] = {} if auto else {"token": delivery.token}
    fields |= {"session": delivery.session, "cursor": delivery.cursor, "deliveries": delivery.deliveries}
    if delivery.gap is not None:
        fields["gap"] = delivery.gap
    return fields


def envelope(delivery: Delivery, *, auto: bool) -> bytes:
    """Encode one event as a line of JSON: the fields of `about` and the stored bytes."""
    data = delivery.data
    if b"\n" in data or b"\r" in data:
        data = msgspec.json.format(data, indent=-1)
    return msgspec.json.encode(about(delivery, auto=auto))[:-1] + b',"event":' + data + b"}"
