"""Pulls events of a durable consumer for one connection, and puts them into the form that services get."""

import asyncio
from contextlib import suppress
from typing import Any, Final

import msgspec

from services.delivery.consumers.session import ConsumerSession, Delivery
from services.kit.jetstream.broker import BrokerUnavailable

__all__ = ["PIECE_BYTES", "SLICE", "STREAM_BATCH", "about", "envelope", "pulled"]

STREAM_BATCH: Final = 200
"""Events taken for one write to a stream; in bytes they are bounded by what one pull may bring."""
PIECE_BYTES: Final = 65_536
SLICE: Final = 1.0
"""Seconds after which a stream looks whether it has to end."""


async def pulled(session: ConsumerSession, limit: int, wait: float, watch: asyncio.Future[Any]) -> list[Delivery]:
    """Return what a pull brings; when ``watch`` ends before, what it had goes back, and nothing is returned."""
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
    """Return what services get with an event; with ``auto`` there is no token, since nothing is to be settled."""
    fields: dict[str, Any] = {} if auto else {"token": delivery.token}
    fields |= {"session": delivery.session, "cursor": delivery.cursor, "deliveries": delivery.deliveries}
    if delivery.gap is not None:
        fields["gap"] = delivery.gap
    return fields


def envelope(delivery: Delivery, *, auto: bool) -> bytes:
    """Return one event as services get it, as a line of JSON: the stored bytes, and what belongs to the delivery."""
    data = delivery.data
    if b"\n" in data or b"\r" in data:
        data = msgspec.json.format(data, indent=-1)
    return msgspec.json.encode(about(delivery, auto=auto))[:-1] + b',"event":' + data + b"}"
