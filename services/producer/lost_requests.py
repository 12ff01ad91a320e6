"""Closes generations that nobody will run any more: their record is open, and the queue has no request for them."""

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
from services.kit.broker import BrokerUnavailable
from services.producer import metrics
from services.producer.adapters.publisher import Lease
from services.producer.errors import ProducerError
from services.producer.relay import LOG_LOST, REQUEST_LOST, Relay, RelayContext

__all__ = ["LostRequests"]

log = structlog.get_logger()
LOOK_SECONDS: Final = 15.0
OPEN: Final = 20_000
"""Bound of open records that are followed, and of those that are looked through when a producer starts."""
AT_ONCE: Final = 100
ENDED: Final = frozenset({"completed", "failed", "cancelled", "interrupted"})
_WHY: Final = {
    REQUEST_LOST: "the request was lost before a producer had it, or the producer with it",
    LOG_LOST: "the log has lost what was stored of it",
}
_STREAM: Final = bucket_stream(BUCKET)
_PREFIX: Final = f"$KV.{BUCKET}."


class LostRequests:
    """Follows the look-up records of all generations, and closes what has lost its request.

    A request is lost with files of the queue, or where a start was refused while nobody could say what of it had been
    stored, and delivery ended before it had taken it back. Each must be seen without a request twice; every producer
    looks, and the log lets one of them write. ``is_held``: whether something runs here. ``lease`` in seconds.
    """

    def __init__(self, context: RelayContext, is_held: Callable[[Address], bool], lease: float) -> None:
        self._context = context
        self._broker = context.broker
        self._is_held = is_held
        self._patience = 2 * lease + LOOK_SECONDS
        self._open: dict[str, GenerationRecord] = {}  # bounded by OPEN
        self._suspects: set[str] = set()
        self._incarnation = ""
        self._seq = 0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._broker.is_connected:
                continue
            try:
                await self.look()
            except (BrokerUnavailable, ProducerError) as error:
                log.warning("open generations not looked at", detail=str(error))

    async def look(self) -> None:
        """Take over what has changed in the records, and close what has been without a request twice.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log does not take a terminal now.
        """
        await self._follow()
        due = self._context.clock.wall() - self._patience
        old = [name for name, record in self._open.items() if record.created_at < due][:AT_ONCE]
        for name in old:
            record = self._open[name]
            if await self._has_request(record):
                self._suspects.discard(name)
                self._open[name] = self._open.pop(name)  # the others have their turn first
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

    async def _has_request(self, record: GenerationRecord) -> bool:
        return await self.is_cared_for(await self._address(record))

    async def is_cared_for(self, address: Address) -> bool:
        """Tell whether a generation's request waits or runs.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        if self._is_held(address):
            return True
        return await self._broker.count(REQUESTS, f"{REQUESTS_PREFIX}.*.{address.generation}") > 0

    async def _address(self, record: GenerationRecord) -> Address:
        """Return where a generation's events are; where the number of partitions puts them, if there are none."""
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
        """Write a terminal; ``False`` when there is one already.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log does not take it now, or somebody else has written.
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
        closed = await Relay(request, 1, lease, self._context).close_lost(record, code, _WHY[code])
        if closed:
            metrics.ORPHANS.labels(code).inc()
            log.error("generation closed", session=record.session, generation=record.generation, code=code)
        return closed

    async def _terminal(self, address: Address) -> AnyEvent | None:
        """Return the terminal that the log holds of a generation."""
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
