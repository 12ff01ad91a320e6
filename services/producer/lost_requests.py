"""Close generations whose request was lost: their record is open, and the queue holds no request for them."""

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import AnyEvent, is_terminal, type_of
from schemas.requests import GenerationRecord, Request
from schemas.subjects import REQUESTS_PREFIX, Address, partition_of, token_subject
from schemas.topology import BUCKET, REQUESTS, bucket_stream, token_stream
from services.producer import metrics
from services.producer.adapters.publisher import Lease
from services.producer.polling import poll_every
from services.producer.relay import LOG_LOST, REQUEST_LOST, Relay, RelayContext

__all__ = ["LostRequests"]

log = structlog.get_logger()
POLL_SECONDS: Final = 15.0
OPEN: Final = 20_000
"""Bound of the open records that are followed, and of those that are read when a producer starts."""
AT_ONCE: Final = 100
ENDED: Final = frozenset({"completed", "failed", "cancelled", "interrupted"})
_MESSAGES: Final = {
    REQUEST_LOST: "the request was lost before a producer received it, or together with its producer",
    LOG_LOST: "the log has lost stored events of the generation",
}
_STREAM: Final = bucket_stream(BUCKET)
_PREFIX: Final = f"$KV.{BUCKET}."


class LostRequests:
    """Follow the look-up records of all generations, and close those that have lost their request.

    A request is lost when the queue loses files, or when a start had an unknown outcome and delivery ended before it
    could withdraw the request. A generation is closed after two polls without a request. Every producer polls; the
    conditional append lets only one of them write. ``is_held``: whether this process holds a generation's request.
    ``lease`` in seconds.
    """

    def __init__(self, context: RelayContext, is_held: Callable[[Address], bool], lease: float) -> None:
        self._context = context
        self._broker = context.broker
        self._is_held = is_held
        self._patience = 2 * lease + POLL_SECONDS
        self._open: dict[str, GenerationRecord] = {}  # bounded by OPEN
        self._suspects: set[str] = set()
        self._incarnation = ""
        self._seq = 0

    async def run(self) -> None:
        """Poll until cancelled."""
        await poll_every(POLL_SECONDS, self._broker, self.poll, "open generations not checked")

    async def poll(self) -> None:
        """Read the changed records, and close generations that had no request in two polls.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log refuses a terminal now.
        """
        await self._follow()
        due = self._context.clock.wall() - self._patience
        old = [name for name, record in self._open.items() if record.created_at < due][:AT_ONCE]
        for name in old:
            record = self._open[name]
            if await self.has_request(await self._address(record)):
                self._suspects.discard(name)
                self._open[name] = self._open.pop(name)  # behind the others
            elif name not in self._suspects:
                self._suspects.add(name)
            else:
                self._suspects.discard(name)
                del self._open[name]
                await self._close(record)

    async def _follow(self) -> None:
        state = await self._broker.state(_STREAM)
        if state.created != self._incarnation or state.last_seq < self._seq:
            self._open.clear()
            self._suspects.clear()
            self._incarnation, self._seq = state.created, max(0, state.last_seq - OPEN)
        if state.last_seq == self._seq:
            return
        async for batch in self._broker.read(_STREAM, _PREFIX + "*.*.*", self._seq + 1):
            for stored in batch:
                self._take(stored.subject, stored.data)
        self._seq = state.last_seq

    def _take(self, subject: str, data: bytes) -> None:
        try:
            record = msgspec.json.decode(data, type=GenerationRecord) if data else None
        except msgspec.DecodeError:
            record = None
        if record is None or record.state in ENDED:
            self._open.pop(subject, None)
            self._suspects.discard(subject)
        elif subject in self._open or len(self._open) < OPEN:
            self._open[subject] = record

    async def has_request(self, address: Address) -> bool:
        """Return whether a generation's request waits in the queue or runs here.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        if self._is_held(address):
            return True
        return await self._broker.count(REQUESTS, f"{REQUESTS_PREFIX}.*.{address.generation}") > 0

    async def _address(self, record: GenerationRecord) -> Address:
        """Return the address of a generation's events; without events, the one by the number of partitions."""
        names = (record.tenant, record.session, record.generation)
        likely = partition_of(record.tenant, record.session, self._context.partitions)
        for partition in (likely, *(p for p in await self._broker.partitions() if p != likely)):
            address = Address.at(partition, *names)
            if await self._broker.last(token_stream(partition), token_subject(address)) is not None:
                return address
        return Address.at(likely, *names)

    async def _close(self, record: GenerationRecord) -> None:
        address = await self._address(record)
        if not await self.close(address, record, REQUEST_LOST):
            terminal = await self._terminal(address)
            if terminal is not None:
                self._context.records.put(_ended(record, terminal))

    async def close(self, address: Address, record: GenerationRecord, code: str) -> bool:
        """Append a terminal; return ``False`` if there is one already.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log refuses it now, or another producer has written.
        """
        request = Request(
            tenant=record.tenant,
            session=record.session,
            generation=record.generation,
            partition=address.partition,
            model=record.model,
            messages=[],
            created_at=record.created_at,
        )
        lease = Lease(asyncio.get_running_loop().time() + self._patience)
        closed = await Relay(request, 1, lease, self._context).close_lost(record, code, _MESSAGES[code])
        if closed:
            metrics.ORPHANS.labels(code).inc()
            log.error("generation closed", session=record.session, generation=record.generation, code=code)
        return closed

    async def _terminal(self, address: Address) -> AnyEvent | None:
        """Return the terminal of a generation in the log."""
        position = BEGINNING
        found: AnyEvent | None = None
        async for batch in self._broker.read(token_stream(address.partition), token_subject(address)):
            for stored in batch:
                try:
                    header = decode_header(stored.data)
                    position, verdict = judge(position, header.type, header.epoch, header.seq)
                    event = decode_event(stored.data) if verdict is Verdict.ACCEPTED else None
                except (MalformedEvent, UnknownEvent):
                    continue
                found = event if event is not None and is_terminal(event) else found
        return found


def _ended(record: GenerationRecord, terminal: AnyEvent) -> GenerationRecord:
    return msgspec.structs.replace(
        record,
        state=type_of(terminal),
        ended_at=terminal.at,
        code=getattr(terminal, "code", None),
        finish_reason=getattr(terminal, "finish_reason", None),
        counted=getattr(terminal, "counted", None),
    )
