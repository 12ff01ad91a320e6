"""What the log still keeps of one generation, as readers need it to join a generation whose events have expired."""

from collections.abc import AsyncIterator, Iterable, Iterator

from schemas.acceptance import highest_epoch
from schemas.codec import Header, MalformedEvent, decode_header
from services.kit.jetstream.broker import Broker, Stored

__all__ = ["headers", "highest_kept_epoch", "keeps"]


def headers(stored: Iterable[Stored]) -> Iterator[Header]:
    """Yield the headers of stored messages; a message that is no event has none."""
    for message in stored:
        try:
            yield decode_header(message.data)
        except MalformedEvent:
            continue


async def highest_kept_epoch(batches: AsyncIterator[list[Stored]]) -> int:
    """Return the highest epoch in all messages that the log keeps of a generation; 0 without any event.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    highest = 0
    async for batch in batches:
        highest = max(highest, highest_epoch(headers(batch)))
    return highest


async def keeps(broker: Broker, stream: str, subject: str, through: int) -> bool:
    """Tell whether the log keeps a message of ``subject`` at or below the stream sequence ``through``.

    Messages expire oldest first: while it does, nothing behind ``through`` has expired.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    first = await broker.first(stream, subject)
    return first is not None and first.seq <= through
