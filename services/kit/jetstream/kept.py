"""The remaining messages of a generation in the log, for readers that join it behind expired events."""

from collections.abc import AsyncIterator, Iterable, Iterator

from schemas.acceptance import highest_epoch
from schemas.codec import Header, MalformedEvent, decode_header
from services.kit.jetstream.broker import Broker, Stored

__all__ = ["headers", "highest_kept_epoch", "keeps"]


def headers(stored: Iterable[Stored]) -> Iterator[Header]:
    """Yield the headers of stored messages; messages that are not events are skipped."""
    for message in stored:
        try:
            yield decode_header(message.data)
        except MalformedEvent:
            continue


async def highest_kept_epoch(batches: AsyncIterator[list[Stored]]) -> int:
    """Return the highest epoch in the remaining messages of a generation; 0 without any event.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    highest = 0
    async for batch in batches:
        highest = max(highest, highest_epoch(headers(batch)))
    return highest


async def keeps(broker: Broker, stream: str, subject: str, through: int) -> bool:
    """Return whether the log still has a message of ``subject`` at or below the stream sequence ``through``.

    Messages expire oldest first: if so, no message after ``through`` has expired.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    first = await broker.first(stream, subject)
    return first is not None and first.seq <= through
