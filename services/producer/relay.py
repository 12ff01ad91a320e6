"""One generation from request to terminal: provider in, log out."""

import asyncio
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog

from schemas.codec import encode_event
from schemas.events import AnyEvent, Started, is_terminal, type_of
from schemas.requests import GenerationRecord, Request
from schemas.subjects import Address, token_subject
from schemas.topology import token_stream
from schemas.usage import Counted
from services.kit.broker import Broker
from services.kit.clock import Clock
from services.producer import metrics
from services.producer.adapters.publisher import Lease, LogWriter, Publisher
from services.producer.adapters.records import Records
from services.producer.core.counting import GenerationCounter, count_input, encoding_of
from services.producer.core.deadlines import Deadlines, Phase, overdue
from services.producer.core.generation import CUT_OFF, Generation
from services.producer.core.parts import Part, UpstreamFailure
from services.producer.core.registry import Candidate, Provider, Registry, UnknownModel
from services.producer.core.takeover import Begun, decide, fold
from services.producer.errors import GiveUp, LogRefused, TryAgain
from services.producer.ports import Call, Upstream, UpstreamRefused

__all__ = ["Interruption", "Outside", "Relay"]

log = structlog.get_logger()
_TAKEOVER_TRIES = 4
STALL_SECONDS = 1.0


class Interruption(msgspec.Struct, frozen=True):
    """Why a running generation is to stop: cancelled, past a deadline, lease lost, or this process goes away."""

    kind: Literal["cancelled", "overdue", "lease", "drain"]
    code: str


class Outside(msgspec.Struct):
    """What all relays of a process share."""

    broker: Broker
    publisher: Publisher
    records: Records
    registry: Registry
    upstream: Callable[[Provider], Upstream]
    clock: Clock
    deadlines: Deadlines
    partitions: int


class HandBack(TryAgain):
    """This process goes away: another producer shall have the request at once."""


class LeaseLost(GiveUp):
    """The queue did not hear from this producer in time: another one has the request."""


class Relay:
    """Runs one request. ``attempt`` counts the queue's deliveries of it, from 1.

    ``interrupt`` may be called at any time from the same event loop; `run` then ends the generation accordingly.
    """

    def __init__(self, request: Request, attempt: int, lease: Lease, outside: Outside) -> None:
        self.request = request
        self.address = _address(request, outside.partitions)
        self._attempt = attempt
        self._lease = lease
        self._outside = outside
        self._interruption: Interruption | None = None
        self._task: asyncio.Task[None] | None = None
        self._writer: LogWriter | None = None
        self._generation: Generation | None = None
        self._record = GenerationRecord(
            tenant=request.tenant,
            session=request.session,
            generation=request.generation,
            state="queued",
            model=request.model,
            created_at=request.created_at,
            metadata=request.metadata,
        )
        self._candidates: list[Candidate] = []
        self._unknown: UnknownModel | None = None
        self._deadlines = outside.deadlines
        self._phase: Phase = "connecting"
        self._begun_at = self._called_at = self._token_at = outside.clock.monotonic()
        self._first_append: int | None = None
        self._stalled = False

    def interrupt(self, interruption: Interruption) -> None:
        """Stop what runs; the first call holds, later ones change nothing."""
        if self._interruption is None:
            self._interruption = interruption
            if self._task is not None:
                self._task.cancel()

    def check(self, now: float) -> None:
        """Interrupt the generation if a deadline has passed or its lease has run out at ``now`` (monotonic seconds)."""
        if now > self._lease.until:
            self.interrupt(Interruption("lease", "lease_lost"))
            return
        code = overdue(
            self._deadlines,
            self._phase,
            now=now,
            begun=self._begun_at,
            called=self._called_at,
            token=self._token_at,
        )
        if code is not None:
            self.interrupt(Interruption("overdue", code))
        elif self._phase == "streaming" and not self._stalled and now - self._token_at > STALL_SECONDS:
            self._stalled = True
            metrics.STALLS.inc()

    async def run(self) -> None:
        """Bring the generation to its terminal, or leave it to whoever owns it now.

        Raises:
            TryAgain: the request must be delivered again.
            GiveUp: somebody else owns the generation; nothing more is written.
        """
        for _ in range(_TAKEOVER_TRIES):
            begun = await self._read_log()
            try:
                await self._proceed(begun)
                return
            except LogRefused as error:
                log.info("generation has grown meanwhile", generation=self.request.generation, detail=str(error))
        raise TryAgain(f"generation {self.request.generation} keeps changing under a takeover")

    async def give_up(self, why: str) -> None:
        """Close the generation as failed without running it: no producer could.

        Raises:
            TryAgain: the log does not take the terminal now.
        """
        begun = await self._read_log()
        if begun.position.ended:
            return
        self._open(begun, begun.position.epoch + 1)
        assert self._generation is not None
        assert self._writer is not None
        try:
            self._first_append = begun.last_seq
            await self._append(self._generation.fail(UpstreamFailure("poison", why), self._now()))
            await self._writer.drain()
        finally:
            self._writer.close()

    async def _read_log(self) -> Begun:
        broker, stream = self._outside.broker, token_stream(self.address.partition)
        subject = token_subject(self.address)
        last = await broker.last(stream, subject)
        if last is None:
            return Begun()
        begun = Begun()
        async for batch in broker.read(stream, subject):
            for stored in batch:
                begun = fold(begun, stored.data, stored.seq)
        if begun.last_seq < last.seq:
            raise TryAgain(f"the log of {subject} ends at {begun.last_seq} and not at {last.seq} on this replica")
        return begun

    async def _proceed(self, begun: Begun) -> None:
        decision = decide(begun, may_restart=self.request.on_producer_loss == "restart")
        if decision == "done":
            return
        self._first_append = begun.last_seq
        epoch = max(self._attempt, begun.position.epoch + (decision != "run"))
        self._open(begun, epoch)
        assert self._writer is not None
        try:
            if decision == "interrupt":
                await self._take_over(begun)
            else:
                await self._cancellable(decision == "restart")
            await self._writer.drain()
        finally:
            self._writer.close()

    def _open(self, begun: Begun, epoch: int) -> None:
        encoding, exact = self._encoding()
        counted_input, input_exact = count_input(self.request.messages, self.request.params, encoding)
        self._generation = Generation(
            self.request.generation,
            epoch=epoch,
            next_seq=begun.position.next_seq,
            counter=GenerationCounter(encoding, exact),
            counted_input=counted_input,
            exact=exact and input_exact,
            encoding=encoding,
        )
        self._writer = self._outside.publisher.writer(token_subject(self.address), self._lease)

    def _encoding(self) -> tuple[str, bool]:
        """Return the tokenizer to count with, and whether it is the model's own."""
        try:
            self._candidates = self._outside.registry.resolve(self.request.model)
        except UnknownModel as error:
            self._unknown = error
            return encoding_of(self.request.model)
        first = self._candidates[0]
        return (first.encoding, True) if first.encoding else encoding_of(first.upstream_model)

    async def _take_over(self, begun: Begun) -> None:
        assert self._generation is not None
        metrics.TAKEOVERS.labels("interrupted").inc()
        counted = self._generation.counted()
        counted = Counted(input=counted.input, output=begun.tokens, exact=False, encoding=counted.encoding)
        await self._append([self._generation.interrupt("producer_lost", counted, self._now())])

    async def _cancellable(self, restart: bool) -> None:
        """Run the calls in this task such that `interrupt` ends them, and write the closing events."""
        assert self._generation is not None
        self._task = asyncio.current_task()
        try:
            if self._interruption is None:
                closing = await self._stream(restart)
        except asyncio.CancelledError:
            if self._interruption is None or self._task is None:
                raise
            self._task.uncancel()
        finally:
            self._task = None
        if self._interruption is not None:
            closing = self._closing(self._interruption)
        await self._append(closing)

    def _closing(self, interruption: Interruption) -> list[AnyEvent]:
        assert self._generation is not None
        match interruption.kind:
            case "cancelled":
                return self._generation.cancel(interruption.code, self._now())
            case "overdue":
                message = f"{interruption.code.removeprefix('deadline_').replace('_', ' ')} deadline passed"
                failure = UpstreamFailure(interruption.code, message, recoverable=True)
                return self._generation.fail(failure, self._now())
            case "drain":
                raise HandBack(f"generation {self.request.generation} is handed over")
            case _:
                raise LeaseLost(f"generation {self.request.generation}: the lease was not renewed in time")

    async def _stream(self, restart: bool) -> list[AnyEvent]:
        """Call the candidates in order until one answers; return the closing events."""
        assert self._generation is not None
        if self._unknown is not None:
            return self._generation.fail(UpstreamFailure("unknown_model", str(self._unknown)), self._now())
        candidates = self._candidates
        await self._begin(candidates[0], restart)
        failure: UpstreamFailure | None = None
        for number, candidate in enumerate(candidates, 1):
            if failure is not None:
                await self._announce_failover(candidate, failure, number)
            failure = await self._call(candidate)
            if failure is None or self._generation.has_tokens or not failure.recoverable:
                break
        if failure is not None:
            return self._generation.fail(failure, self._now())
        return self._generation.end(self._now())

    async def _begin(self, candidate: Candidate, restart: bool) -> None:
        assert self._generation is not None
        request = self.request
        if restart:
            metrics.TAKEOVERS.labels("restarted").inc()
            event: AnyEvent = self._generation.restart(
                "producer_lost", candidate.provider.name, candidate.upstream_model, self._now()
            )
        else:
            event = self._generation.start(
                request.model, candidate.provider.name, candidate.upstream_model, request.metadata, self._now()
            )
        await self._append([event])
        stored = await self._outside.records.get(request.tenant, request.session, request.generation)
        if stored is not None:
            self._record = stored
            if stored.state == "cancelling":
                self.interrupt(Interruption("cancelled", "requested"))
                await asyncio.sleep(0)  # the cancellation of this task arrives here
        self._note(state="running", started_at=event.at, **_upstream(candidate))

    async def _announce_failover(self, candidate: Candidate, failure: UpstreamFailure, number: int) -> None:
        assert self._generation is not None
        self._generation.provider = candidate.provider.name
        self._generation.upstream_model = candidate.upstream_model
        notice = self._generation.notice("failover", failure.message, self._now(), attempt=number)
        await self._append([notice])

    async def _call(self, candidate: Candidate) -> UpstreamFailure | None:
        """Relay one candidate's answer; return why it failed, or ``None`` when its end marker came."""
        clock = self._outside.clock
        self._deadlines = self._outside.deadlines.overridden(candidate.deadlines)
        self._phase = "connecting"
        self._called_at = clock.monotonic()
        call = Call(
            model=candidate.upstream_model,
            messages=self.request.messages,
            params=self.request.params,
            connect_timeout=self._deadlines.connect,
        )
        try:
            async with self._outside.upstream(candidate.provider).open(call) as stream:
                self._phase = "waiting"
                while True:
                    parts = await stream.read()
                    if parts is None:
                        break
                    if parts:
                        await self._relay(parts, candidate.provider.name)
                        if self._generation is not None and self._generation.ending is not None:
                            break
        except UpstreamRefused as error:
            metrics.UPSTREAM_ERRORS.labels(candidate.provider.name, error.failure.code).inc()
            return error.failure
        return self._failure(candidate.provider.name)

    def _failure(self, provider: str) -> UpstreamFailure | None:
        assert self._generation is not None
        ending = self._generation.ending
        if ending is not None and not isinstance(ending, UpstreamFailure):
            return None
        failure = ending if isinstance(ending, UpstreamFailure) else CUT_OFF
        metrics.UPSTREAM_ERRORS.labels(provider, failure.code).inc()
        self._generation.ending = None
        return failure

    async def _relay(self, parts: list[Part], provider: str) -> None:
        assert self._generation is not None
        assert self._writer is not None
        events = self._generation.absorb(parts, self._now())
        if not events:
            return
        now = self._outside.clock.monotonic()
        if self._phase == "streaming":
            metrics.TOKEN_GAP.observe(now - self._token_at)
        else:
            self._phase = "streaming"
            metrics.FIRST_TOKEN.labels(provider).observe(now - self._called_at)
        self._token_at = now
        self._stalled = False
        for event in events:
            await self._writer.publish(encode_event(event))
        metrics.READS.inc()
        metrics.EVENTS.inc(len(events))

    async def _append(self, events: list[AnyEvent]) -> None:
        assert self._writer is not None
        for event in events:
            data = encode_event(event)
            if self._first_append is not None:
                last, self._first_append = self._first_append, None
                await self._writer.publish_first(data, last)
            else:
                await self._writer.publish(data)
            metrics.EVENTS.inc()
            if is_terminal(event):
                self._end(event)
        if events and isinstance(events[0], Started):
            self._token_at = self._outside.clock.monotonic()

    def _end(self, event: AnyEvent) -> None:
        assert self._generation is not None
        kind = type_of(event)
        code = getattr(event, "code", None)
        metrics.ENDED.labels(kind, code or "").inc()
        counted = getattr(event, "counted", None)
        metrics.TOKENS.inc(counted.output if counted else 0)
        self._note(
            state=kind,
            ended_at=event.at,
            code=code,
            finish_reason=getattr(event, "finish_reason", None),
            counted=counted,
            usage=self._generation.usage,
            upstream_model=self._generation.upstream_model or self._record.upstream_model,
        )
        log.info(
            "generation ended",
            session=self.request.session,
            generation=self.request.generation,
            terminal=kind,
            code=code,
            tokens=counted.output if counted else 0,
        )

    def _note(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        self._outside.records.put(self._record)

    def _now(self) -> float:
        return round(self._outside.clock.wall(), 6)


def _address(request: Request, partitions: int) -> Address:
    if request.partition is None:  # queued before requests named their partition
        return Address.of(request.tenant, request.session, request.generation, partitions)
    return Address.at(request.partition, request.tenant, request.session, request.generation)


def _upstream(candidate: Candidate) -> dict[str, str]:
    return {"provider": candidate.provider.name, "upstream_model": candidate.upstream_model}
