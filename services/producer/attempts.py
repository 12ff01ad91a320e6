"""Asking providers: candidates in turn, calls made again, and one answer relayed to the journal."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
import tenacity

from schemas.events import AbandonedCall, AnyEvent, Notice
from schemas.requests import Request
from services.kit.clock import Clock
from services.producer import metrics
from services.producer.adapters.circuits import Circuits, Permit
from services.producer.core.deadlines import Deadlines, Phase, overdue
from services.producer.core.generation import CUT_OFF
from services.producer.core.parts import End, Part, UpstreamFailure, UsagePart
from services.producer.core.registry import Candidate, Provider
from services.producer.core.retry import REFUSED, CallFailed, RetryPolicy, helps_elsewhere
from services.producer.errors import Fenced
from services.producer.journal import Journal
from services.producer.ports import Upstream, UpstreamRefused, UpstreamRequest, UpstreamStream
from services.producer.upstream_limits import UpstreamLimits

__all__ = ["Asking", "Interruption", "Upstreams"]

log = structlog.get_logger()
STALL_SECONDS = 1.0
MODEL_LIMIT = 120  # characters of a model's name in a log line
_OPEN = UpstreamFailure(
    "upstream_circuit_open", "the upstream is taken to be down; it is not asked now", recoverable=True
)


class Upstreams:
    """The providers as a process reaches them, and what holds for calling them."""

    def __init__(
        self,
        of: Callable[[Provider], Upstream],
        circuits: Circuits,
        gates: UpstreamLimits,
        retry: RetryPolicy,
        deadlines: Deadlines,
    ) -> None:
        self.of = of
        self.circuits = circuits
        self.gates = gates
        self.retry = retry
        self.deadlines = deadlines


class Interruption(Exception):
    """Why what runs is to stop.

    ``kind``: ``cancelled``, ``over_budget``, ``overdue`` (a deadline of the whole), ``attempt`` (a deadline of one
    call), ``lease``, ``lost`` (the log has lost events of it), or ``drain`` (this process goes away).
    """

    def __init__(self, kind: str, code: str) -> None:
        self.kind = kind
        self.code = code
        super().__init__(f"{kind}: {code}")

    @property
    def is_wanted(self) -> bool:
        """Whether somebody has decided so, and nothing went wrong: the provider may still tell its usage."""
        return self.kind in ("cancelled", "over_budget")


class Asking:
    """Brings one answer. `check` and `interrupt` are called from outside, on the same event loop."""

    def __init__(self, request: Request, journal: Journal, upstreams: Upstreams, clock: Clock) -> None:
        self._request = request
        self._journal = journal
        self._generation = journal.generation
        self._upstreams = upstreams
        self._clock = clock
        self._deadlines = self._limits = upstreams.deadlines  # with and without the request's own
        self._permit: Permit | None = None
        self._phase: Phase = "queued"
        self._begun_at = self._called_at = self._token_at = clock.monotonic()
        self._stalled = False
        self._task: asyncio.Task[object] | None = None
        self._interruption: Interruption | None = None
        self._patience: asyncio.Timeout | None = None  # with an answer that is read on for its usage alone
        self._attempts = 0
        self.provider: Provider | None = None  # the last one that was asked
        self.abandoned: list[tuple[AbandonedCall, Provider]] = []  # at most as many as attempts are allowed

    def interrupt(self, interruption: Interruption) -> None:
        """Stop the call that runs; the first interruption holds until it is dealt with, unless it was of one call.

        A later one that lets no time for it ends the wait for a cancelled answer's usage.
        """
        held = self._interruption
        patience = self._patience
        if patience is not None and interruption.kind in ("drain", "lease", "lost") and not patience.expired():
            patience.reschedule(asyncio.get_running_loop().time())
        if held is None or held.kind == "attempt":
            self._interruption = interruption
            if held is None and self._task is not None:
                self._task.cancel()

    def check(self, now: float) -> None:
        """Stop what takes too long at ``now`` (monotonic seconds); say when an answer stalls."""
        code = overdue(
            self._deadlines,
            self._phase,
            now=now,
            begun=self._begun_at,
            called=self._called_at,
            token=self._token_at,
        )
        if code is not None:
            kind = "attempt" if code in ("deadline_connect", "deadline_first_token") else "overdue"
            self.interrupt(Interruption(kind, code))
        elif self._phase == "streaming" and not self._stalled and now - self._token_at > STALL_SECONDS:
            self._stalled = True
            metrics.STALLS.inc()
            silence = now - self._token_at
            notice = self._generation.notice(
                "stalled", "no token for a while", self._journal.now(), delay=round(silence, 3)
            )
            try:
                self._journal.append_aside([notice])
            except Fenced:
                self.interrupt(Interruption("lease", "lease_lost"))

    async def run(self, candidates: list[Candidate]) -> list[AnyEvent]:
        """Ask the candidates in order until one answers; return the closing events.

        Raises:
            Interruption: `interrupt` was called, for another reason than the deadline of one call.
        """
        self._task = asyncio.current_task()
        failure: UpstreamFailure | None = None
        try:
            if self._interruption is not None:
                raise self._interruption
            for number, candidate in enumerate(candidates):
                if failure is not None and not candidate.failover:
                    continue
                if number and failure is not None:
                    await self._turn_to(candidate, failure)
                failure = await self._candidate(candidate)
                if failure is None or self._generation.has_tokens or not helps_elsewhere(failure):
                    break
        finally:
            self._task = None
        if failure is not None:
            return self._generation.fail(failure, self._journal.now())
        return self._generation.end(self._journal.now())

    async def _turn_to(self, candidate: Candidate, failure: UpstreamFailure) -> None:
        call = self._abandon(failure)
        self._generation.provider = candidate.provider.name
        self._generation.upstream_model = candidate.upstream_model
        metrics.FAILOVERS.labels(candidate.provider.name).inc()
        at = self._journal.now()
        attempt = self._attempts + 1
        await self._append([self._generation.notice("failover", failure.message, at, attempt=attempt, call=call)])

    def _abandon(self, failure: UpstreamFailure) -> AbandonedCall | None:
        """Leave the call that has failed for another one, and keep what is known of it."""
        call = self._generation.abandon_call(failure)
        if call is not None and self.provider is not None:
            self.abandoned.append((call, self.provider))
            metrics.TOKENS.inc(call.counted.output)
        return call

    async def _candidate(self, candidate: Candidate) -> UpstreamFailure | None:
        """Call one candidate as often as the policy allows; return why it failed, or ``None``."""
        policy = self._upstreams.retry

        def again(error: BaseException) -> bool:
            return isinstance(error, CallFailed) and policy.retries(error.failure) and self._may_ask_again()

        async def announce(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, CallFailed) and state.next_action is not None:
                await self._announce_retry(candidate, error.failure, state.next_action.sleep)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(policy.max_attempts),
            wait=policy.pause,
            retry=tenacity.retry_if_exception(again),
            before_sleep=announce,
            sleep=self._pause,
            reraise=True,
        )
        try:
            await retrying(self._call, candidate)
        except CallFailed as error:
            return error.failure
        return None

    def _may_ask_again(self) -> bool:
        """Before the first token always; after it only where the request allows the answer to begin anew."""
        return not self._generation.has_tokens or self._request.on_producer_loss == "restart"

    async def _announce_retry(self, candidate: Candidate, failure: UpstreamFailure, pause: float) -> None:
        metrics.RETRIES.labels(candidate.provider.name, failure.code).inc()
        if self._generation.has_tokens:
            self._phase = "queued"
            await self._interruptible(self._journal.settle())
            call = self._abandon(failure)
            event: AnyEvent = self._generation.begin_anew("upstream_failed", call, self._journal.now())
        else:
            at, attempt = self._journal.now(), self._attempts + 1
            call = self._abandon(failure)
            event = self._generation.notice(
                "retrying", failure.message, at, attempt=attempt, delay=round(pause, 3), call=call
            )
        await self._append([event])

    async def _pause(self, seconds: float) -> None:
        self._phase = "queued"
        await self._interruptible(asyncio.sleep(seconds))

    async def _append(self, events: list[AnyEvent]) -> None:
        self._phase = "queued"
        await self._interruptible(self._journal.append(events))

    async def _interruptible(self, what: Awaitable[None]) -> None:
        """Await something between two calls, where `interrupt` means the whole generation."""
        try:
            await what
        except asyncio.CancelledError:
            raise self._dealt_with() from None

    async def _call(self, candidate: Candidate) -> None:
        """Relay one candidate's answer.

        Raises:
            CallFailed: it brought no complete answer.
        """
        provider = candidate.provider
        self._limits = self._upstreams.deadlines.overridden(candidate.deadlines)
        self._deadlines = self._limits.overridden(self._request.deadlines)
        gate = self._upstreams.gates.of(provider.name, provider.max_streams, provider.requests_per_minute)
        self._phase = "queued"
        if self._upstreams.circuits.is_open(provider.name, candidate.upstream_model, self._request.tenant):
            raise _failed(candidate, _OPEN)
        try:
            async with gate.passing(self._request.priority, self._request.created_at):
                await self._admitted(candidate)
        except asyncio.CancelledError:
            interruption = self._dealt_with()
            if interruption.kind != "attempt":
                raise interruption from None
            failure = UpstreamFailure(interruption.code, _said(interruption.code), recoverable=True)
            self._blame(failure)
            raise _failed(candidate, failure) from None
        finally:
            self._phase = "queued"

    def _dealt_with(self) -> Interruption:
        """Return the interruption behind a cancellation of this task, which ends with it; others go on."""
        interruption = self._interruption
        if interruption is None or self._task is None:
            raise asyncio.CancelledError
        self._task.uncancel()
        self._interruption = None
        return interruption

    async def _admitted(self, candidate: Candidate) -> None:
        provider = candidate.provider
        permit = self._upstreams.circuits.admit(provider.name, candidate.upstream_model, self._request.tenant)
        if permit is None:
            raise _failed(candidate, _OPEN)
        self._attempts += 1
        self.provider, self._permit = provider, permit
        self._called_at = self._clock.monotonic()
        self._phase = "connecting"
        call = UpstreamRequest(
            model=candidate.upstream_model,
            messages=self._request.messages,
            params=self._request.params,
            connect_timeout=self._deadlines.connect,
        )
        try:
            async with self._upstreams.of(provider).open(call) as stream:
                self._phase = "waiting"
                permit.connected()
                self._generation.begin_answer()
                await self._stream(stream, provider)
        except UpstreamRefused as error:
            if error.failure.upstream_status is not None:
                permit.connected()
            self._blame(error.failure, connected=error.connected)
            raise _failed(candidate, error.failure) from error
        finally:
            permit.left()
        ending = self._generation.ending
        if ending is None or isinstance(ending, UpstreamFailure):
            self._generation.ending = None
            self._blame(ending or CUT_OFF)
            raise _failed(candidate, ending or CUT_OFF)
        permit.succeeded()

    def _blame(self, failure: UpstreamFailure, *, connected: bool = True) -> None:
        """Tell the circuits of a failure before the first token, unless the request itself let too little time."""
        if self._permit is not None and not self._generation.has_tokens and not self._is_hurried(failure):
            self._permit.failed(failure, connected=connected)

    def _is_hurried(self, failure: UpstreamFailure) -> bool:
        own, limits = self._deadlines, self._limits
        match failure.code:
            case "deadline_first_token":
                return own.first_token < limits.first_token
            case "deadline_connect":
                return own.connect < limits.connect
            case "upstream_unreachable":
                return own.connect < limits.connect and self._clock.monotonic() - self._called_at >= own.connect
            case _:
                return False

    async def _stream(self, stream: UpstreamStream, provider: Provider) -> None:
        try:
            while True:
                parts = await stream.read()
                if parts is None:
                    return
                if parts:
                    await self._relay(parts, provider)
                    if self._generation.ending is not None:
                        return
        except asyncio.CancelledError:
            wanted = self._interruption is not None and self._interruption.is_wanted
            if wanted and provider.after_cancel == "drain" and self._task is not None:
                self._task.uncancel()
                await self._drain(stream, provider.drain_seconds)
                self._task.cancel()
                await asyncio.sleep(0)
            raise

    async def _drain(self, stream: UpstreamStream, seconds: float) -> None:
        """Read on without relaying until the provider tells its usage, at most so long."""
        self._phase = "queued"
        try:
            async with asyncio.timeout(seconds) as self._patience:
                while self._generation.usage is None:
                    parts = await stream.read()
                    if parts is None:
                        return
                    usage = [part for part in parts if isinstance(part, UsagePart)]
                    self._generation.absorb(list(usage), self._journal.now())
                    if any(isinstance(part, End | UpstreamFailure) for part in parts):
                        return
        except TimeoutError:
            return
        finally:
            self._patience = None

    async def _relay(self, parts: list[Part], provider: Provider) -> None:
        events = self._generation.absorb(parts, self._journal.now())
        if not events:
            return
        if isinstance(events[0], Notice) and all(isinstance(event, Notice) for event in events):
            phase = self._phase  # it is no token
            self._phase = "queued"
            await self._journal.append(events)
            self._phase = phase
            return
        now = self._clock.monotonic()
        if self._phase == "streaming":
            metrics.TOKEN_GAP.observe(now - self._token_at)
        else:
            metrics.FIRST_TOKEN.labels(provider.name).observe(now - self._called_at)
            if self._permit is not None:
                self._permit.succeeded()
        self._stalled = False
        metrics.READS.inc()
        self._phase = "queued"  # a full log is no silence of the provider
        await self._journal.append(events)
        self._phase = "streaming"
        self._token_at = self._clock.monotonic()


def _failed(candidate: Candidate, failure: UpstreamFailure) -> CallFailed:
    """Count a failed call, and raise the alarm where a candidate will refuse until somebody acts."""
    provider = candidate.provider.name
    metrics.UPSTREAM_ERRORS.labels(provider, failure.code).inc()
    if failure.code in REFUSED and not failure.recoverable:
        # A model that the configuration does not name may be a caller's slip.
        if candidate.configured or failure.code != "upstream_not_found":
            metrics.REFUSALS.labels(provider, failure.code).inc()
        log.warning(
            "upstream refused",
            provider=provider,
            model=candidate.upstream_model[:MODEL_LIMIT],
            code=failure.code,
            upstream_status=failure.upstream_status,
            detail=failure.message,
        )
    return CallFailed(failure)


def _said(code: str) -> str:
    return f"{code.removeprefix('deadline_').replace('_', ' ')} deadline passed"
