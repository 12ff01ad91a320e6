"""Run one generation from its request to its terminal: read the log, take over or begin, call, close."""

import asyncio

import msgspec
import structlog

from schemas.codec import MalformedEvent, decode_header
from schemas.events import AbandonedCall, AnyEvent
from schemas.requests import GenerationRecord, Request
from schemas.subjects import Address, token_subject
from schemas.topology import token_stream
from schemas.usage import Counted
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.tasks import together
from services.producer import metrics
from services.producer.adapters.publisher import Lease, LogWriter, Publisher
from services.producer.adapters.records import Records
from services.producer.attempts import Attempts
from services.producer.call import CallContext, deadline_message
from services.producer.cancel import obey_noted_cancel
from services.producer.core.counting import GenerationCounter, count_input, encoding_of
from services.producer.core.generation import Generation
from services.producer.core.parts import UpstreamFailure
from services.producer.core.registry import Candidate, Provider, Registry, UnknownModel
from services.producer.core.takeover import Begun, decide, lost_call
from services.producer.errors import GiveUp, LogRefused, TryAgain
from services.producer.interruption import Interruption, Stopped, StopReason
from services.producer.journal import Journal
from services.producer.late_usage import LateUsage, UsageLookup
from services.producer.ports import UsageSource

__all__ = ["LOG_LOST", "REQUEST_LOST", "HandBack", "LeaseLost", "Relay", "RelayContext", "read_begun"]

log = structlog.get_logger()
_TAKEOVER_TRIES = 4
READ_AGAIN_SECONDS = 0.5
LOG_LOST = "log_lost"
REQUEST_LOST = "request_lost"


class RelayContext(msgspec.Struct):
    """Dependencies that all relays of a process share."""

    broker: Broker
    publisher: Publisher
    records: Records
    registry: Registry
    calls: CallContext
    late_usage: LateUsage
    clock: Clock
    partitions: int


class HandBack(TryAgain):
    """This process shuts down: hand the request back to the queue for another producer."""


class LeaseLost(GiveUp):
    """Another producer has claimed the request, or its lease could not be renewed for too long."""


class Relay:
    """Run one request. ``delivery`` counts the queue's deliveries of it, from 1.

    ``interruption`` stops it at any time; `run` then closes the generation according to the reason.
    """

    def __init__(self, request: Request, delivery: int, lease: Lease, context: RelayContext) -> None:
        self.request = request
        self.address = _address(request, context.partitions)
        self.journal: Journal | None = None
        self.interruption = Interruption()
        self.ended = False  # whether the generation has its terminal, written here or before
        self._delivery = delivery
        self._taken_at = context.clock.monotonic()
        self._lease = lease
        self._context = context
        self._attempts: Attempts | None = None  # while providers are called
        self._provider: Provider | None = None  # the last one that was called
        self._abandoned: list[tuple[AbandonedCall, Provider]] = []
        self._log_lost = False  # then a takeover is logged as `LOG_LOST`, not as the loss of a producer

    def check(self, now: float) -> None:
        """Interrupt the generation if a deadline has passed at ``now`` (monotonic seconds) or its lease is lost.

        A lapsed lease may be renewed for ``give_up`` seconds, as long as a log may refuse events.
        """
        if self._lease.is_lost or now > self._lease.until + self._context.publisher.give_up:
            self.interruption.interrupt("lease", "lease_lost")
        elif self._attempts is not None:
            self._attempts.check_deadlines(now)

    async def compare(self, *, whole: bool) -> None:
        """Interrupt the generation if the log has lost acknowledged events of it.

        ``whole``: read all stored events, not only the last one.

        Raises:
            TryAgain: the log cannot be read now.
            BrokerUnavailable: the log cannot be read now.
        """
        if await self._has_lost(whole=whole):
            self.interruption.interrupt("lost", LOG_LOST)

    async def _has_lost(self, *, whole: bool) -> bool:
        journal = self.journal
        if journal is None or not (acknowledged := journal.acknowledged):
            return False
        # Where only the end can be missing, reading the last event is enough.
        stream, subject = token_stream(self.address.partition), token_subject(self.address)
        if not whole:
            last = await self._context.broker.last(stream, subject)
            if last is not None and _seq(last.data) >= acknowledged - 1:
                return False
        # Otherwise read all: the log must hold every acknowledged event from seq 0, unless the first ones have expired.
        begun = await self._read_once()
        first = await self._context.broker.first(stream, subject)
        max_age = (await self._context.broker.state(stream)).max_age
        is_young = not max_age or self._context.clock.wall() - self.request.created_at < max_age
        is_headless = is_young and (first is None or _seq(first.data) > 0)
        # In a higher epoch another producer has taken over: the gap is not of our events.
        is_ours = begun.position.epoch <= journal.generation.epoch
        has_lost = is_ours and (is_headless or begun.position.next_seq < acknowledged)
        if has_lost:
            metrics.LOST_ANSWERS.inc()
            log.error(
                "acknowledged events of a running answer lost by the log",
                generation=self.request.generation,
                acknowledged=acknowledged,
                kept=begun.position.next_seq,
            )
        return has_lost

    async def run(self) -> bool:
        """Bring the generation to its terminal; return ``False`` if it had one already.

        Raises:
            TryAgain: the request must be delivered again.
            GiveUp: another producer owns the generation; stop writing.
        """
        # A first delivery finds nothing in the log; its first append is conditional on that, so no read is needed.
        begun = Begun() if self._delivery == 1 and self.interruption.reason is None else await self._read_log()
        for _ in range(_TAKEOVER_TRIES):
            try:
                needed = await self._proceed(begun)
                self.ended = True
                return needed
            except LogRefused as error:
                log.info("generation read again", generation=self.request.generation, detail=str(error))
            begun = await self._read_log()
        raise TryAgain(f"generation {self.request.generation} changed repeatedly during a takeover")

    async def fail_unrun(self, why: str) -> None:
        """Close the generation as failed (``poison``) without running it: no producer could.

        Raises:
            TryAgain: the log refuses the terminal now.
        """
        begun = await self._read_log()
        if begun.position.ended:
            return
        writer = self._context.publisher.writer(token_subject(self.address), self._lease)
        try:
            journal, _candidates = self._journal(begun, begun.position.epoch + 1, writer)
            await journal.append(journal.generation.fail(UpstreamFailure("poison", why), journal.now()))
            await writer.drain()
        finally:
            writer.close()

    async def close_lost(self, record: GenerationRecord, code: str, why: str) -> bool:
        """Close a generation that no producer runs or will run; return ``False`` if it has ended already.

        Raises:
            TryAgain: the log refuses the terminal now.
            LogRefused: a producer does run it.
        """
        begun = await self._read_log()
        if begun.position.ended:
            return False
        writer = self._context.publisher.writer(token_subject(self.address), self._lease)
        try:
            self.journal, _candidates = self._journal(begun, begun.position.epoch + 1, writer)
            self.journal.record = record
            if begun.has_tokens:
                await self.journal.append([self._interrupted(begun, code)])
            else:
                failure = UpstreamFailure(code, why, recoverable=True)
                await self.journal.append(self.journal.generation.fail(failure, self.journal.now()))
            await writer.drain()
        finally:
            writer.close()
        return True

    async def _read_log(self) -> Begun:
        """Read the generation's events; retry while the log has no leader or a lagging replica answers.

        Raises:
            HandBack: the request must be handed over.
            TryAgain: the log could not be read in time, or the generation was interrupted.
            BrokerUnavailable: likewise.
        """
        clock = self._context.clock
        give_up_at = clock.monotonic() + self._context.publisher.give_up
        while True:
            reason = self.interruption.reason
            if reason is not None and reason.hands_over:
                raise HandBack(f"generation {self.request.generation} is handed over unread")
            try:
                return await self.interruption.reading(self._read_once())
            except TimeoutError:
                raise HandBack(f"generation {self.request.generation} is handed over unread") from None
            except (TryAgain, BrokerUnavailable):
                is_interrupted = self.interruption.reason is not None
                if is_interrupted or clock.monotonic() > min(give_up_at, self._lease.until):
                    raise
            await asyncio.sleep(READ_AGAIN_SECONDS)

    async def _read_once(self) -> Begun:
        broker, stream = self._context.broker, token_stream(self.address.partition)
        subject = token_subject(self.address)
        last = await broker.last(stream, subject)
        if last is None:
            return Begun()
        begun = await read_begun(broker, stream, subject)
        if begun.last_seq < last.seq:
            raise TryAgain(
                f"this replica's log of {subject} ends at {begun.last_seq}, but the last event is {last.seq}"
            )
        return begun

    async def _proceed(self, begun: Begun) -> bool:
        """Run, restart or interrupt the generation according to the log; return ``False`` if it has ended already."""
        decision = decide(begun, may_restart=self.request.on_producer_loss == "restart")
        if decision == "done":
            return False
        # A takeover begins a new epoch, so that readers drop whatever the other producer may still write.
        epoch = max(self._delivery, begun.position.epoch + (decision != "run"))
        reconnects = self._context.broker.reconnects
        writer = self._context.publisher.writer(token_subject(self.address), self._lease)
        try:
            self.journal, candidates = self._journal(begun, epoch, writer)
            if decision == "interrupt":
                await self.journal.append([self._interrupted(begun, self._loss)])
            elif isinstance(candidates, UnknownModel):
                failure = UpstreamFailure("unknown_model", str(candidates))
                await self.journal.append(self.journal.generation.fail(failure, self.journal.now()))
            else:
                await self._begin(self.journal, candidates[0], begun if decision == "restart" else None)
                await self.journal.append(await self._call(self.journal, candidates))
            await writer.drain()
            # A broker that was unavailable may have lost acknowledged events: the answer is then incomplete.
            if reconnects != self._context.broker.reconnects and await self._has_lost(whole=True):
                self._log_lost = True
                raise LogRefused(f"the log has lost events of generation {self.request.generation}")
        finally:
            writer.close()
        self._look_up_usage()
        return True

    def _look_up_usage(self) -> None:
        """Start look-ups of the usage of incomplete calls, at providers that offer it."""
        if self.journal is None:
            return
        generation = self.journal.generation
        calls = [
            (UsageLookup(call.number, call.upstream_id, call.provider, call.upstream_model), provider)
            for call, provider in self._abandoned
            if call.upstream_id is not None and call.source != "stream"
        ]
        is_reported = generation.usage is not None and generation.usage_source == "stream"
        is_wanted = self.journal.record.state != "completed" and not is_reported
        if self._provider is not None and generation.upstream_id is not None and is_wanted:
            last = UsageLookup(0, generation.upstream_id, generation.provider, generation.upstream_model)
            calls.append((last, self._provider))
        sources = [(call, self._context.calls.of(p)) for call, p in calls if p.after_cancel == "lookup"]
        wanted: list[tuple[UsageLookup, UsageSource]] = [
            (call, source) for call, source in sources if isinstance(source, UsageSource)
        ]
        if wanted:
            self._context.late_usage.look_up(self.address, generation, wanted)

    def _journal(self, begun: Begun, epoch: int, writer: LogWriter) -> tuple[Journal, list[Candidate] | UnknownModel]:
        request, context = self.request, self._context
        candidates = self._candidates()
        encoding, exact = _encoding(request.model, candidates)
        counted_input, input_exact = count_input(request.messages, request.params, encoding)
        generation = Generation(
            request.generation,
            epoch=epoch,
            next_seq=begun.position.next_seq,
            counter=lambda: GenerationCounter(encoding, exact),
            counted_input=counted_input,
            exact=exact and input_exact,
            encoding=encoding,
            abandoned=begun.abandoned,
        )
        record = GenerationRecord(
            tenant=request.tenant,
            session=request.session,
            generation=request.generation,
            state="queued",
            model=request.model,
            created_at=request.created_at,
            metadata=request.metadata,
            key=request.key,
            request_hash=request.request_hash,
        )
        journal = Journal(generation, writer, context.records, record, context.clock, begun.last_seq, self._read_log)
        return journal, candidates

    def _candidates(self) -> list[Candidate] | UnknownModel:
        try:
            return self._context.registry.resolve(self.request.model)
        except UnknownModel as error:
            return error

    def _interrupted(self, begun: Begun, reason: str) -> AnyEvent:
        assert self.journal is not None
        metrics.TAKEOVERS.labels("interrupted").inc()
        counted = self.journal.generation.counted()
        counted = Counted(input=counted.input, output=begun.tokens, exact=False, encoding=counted.encoding)
        return self.journal.generation.interrupt(reason, counted, self.journal.now())

    @property
    def _loss(self) -> str:
        """Return the reason to log when a begun answer is taken over."""
        return LOG_LOST if self._log_lost else "producer_lost"

    async def _begin(self, journal: Journal, candidate: Candidate, begun: Begun | None) -> None:
        """Append the first event: ``started``, or ``restarted`` for an answer that begins again after ``begun``."""
        request, generation, at = self.request, journal.generation, journal.now()
        upstream = (candidate.provider.name, candidate.upstream_model)
        if begun is not None:
            metrics.TAKEOVERS.labels("restarted").inc()
            lost = lost_call(begun, generation.counted())
            event: AnyEvent = generation.restart(self._loss, *upstream, at, lost)
        else:
            event = generation.start(request, *upstream, at)
        stored, _ = await together(
            self._context.records.get(request.tenant, request.session, request.generation), journal.append([event])
        )
        if stored is not None:
            journal.record = stored
            obey_noted_cancel(stored, self.interruption)
        metrics.BEGUN_STAGE.observe(self._context.clock.monotonic() - self._taken_at)
        journal.update_record(state="running", started_at=at, provider=upstream[0], upstream_model=upstream[1])

    async def _call(self, journal: Journal, candidates: list[Candidate]) -> list[AnyEvent]:
        """Call the providers; return the closing events of their answer, of their failure, or of an interruption."""
        context = self._context
        attempts = Attempts(self.request, journal, context.calls, self.interruption, context.clock)
        self._attempts = attempts
        try:
            return await attempts.run(candidates)
        except Stopped as stopped:
            return self._closing(journal, stopped.reason)
        finally:
            self._provider, self._abandoned = attempts.provider, attempts.abandoned
            self._attempts = None

    def _closing(self, journal: Journal, reason: StopReason) -> list[AnyEvent]:
        """Return the closing events of an interrupted generation.

        Raises:
            LogRefused: the log has lost events; the generation must be read again.
            HandBack: the request must be handed over.
            LeaseLost: another producer may own the generation.
        """
        generation, at = journal.generation, journal.now()
        match reason.kind:
            case "cancelled":
                return generation.cancel(reason.code, at)
            case "over_budget":
                message = "the hard limit of a budget was reached"
                return generation.fail(UpstreamFailure(reason.code, message), at)
            case "overdue":
                failure = UpstreamFailure(reason.code, deadline_message(reason.code), recoverable=True)
                return generation.fail(failure, at)
            case "lost":
                self.interruption.resume()
                self._log_lost = True
                raise LogRefused(f"the log has lost events of generation {self.request.generation}")
            case "drain":
                raise HandBack(f"generation {self.request.generation} is handed over")
            case _:
                raise LeaseLost(f"generation {self.request.generation} lost its lease")


async def read_begun(broker: Broker, stream: str, subject: str) -> Begun:
    """Read a generation's events from the log; join at the highest kept epoch if its first events have expired.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    begun = await _fold(broker, stream, subject, Begun())
    return (
        await _fold(broker, stream, subject, Begun.joining(begun.acceptance.highest)) if begun.lost_beginning else begun
    )


async def _fold(broker: Broker, stream: str, subject: str, begun: Begun) -> Begun:
    async for batch in broker.read(stream, subject):
        for stored in batch:
            begun.take(stored.data, stored.seq)
    return begun


def _seq(data: bytes) -> int:
    try:
        return decode_header(data).seq
    except MalformedEvent:
        return -1


def _encoding(model: str, candidates: list[Candidate] | UnknownModel) -> tuple[str, bool]:
    """Return the tokenizer to count with, and whether it is the model's own."""
    if isinstance(candidates, UnknownModel):
        return encoding_of(model)
    first = candidates[0]
    return (first.encoding, True) if first.encoding else encoding_of(first.upstream_model)


def _address(request: Request, partitions: int) -> Address:
    if request.partition is None:  # queued before requests named their partition
        return Address.of(request.tenant, request.session, request.generation, partitions)
    return Address.at(request.partition, request.tenant, request.session, request.generation)
