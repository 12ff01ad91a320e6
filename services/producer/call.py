"""One call to a provider: wait for its limits, connect, stream to the journal, read on for usage after a cancel.

`Call` makes exactly one call of one candidate; `services.producer.attempts` decides about retries and failover.
"""

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from schemas.events import Notice
from schemas.requests import Request
from services.kit.clock import Clock
from services.producer import metrics
from services.producer.adapters.circuits import Circuits, Permit
from services.producer.core.deadlines import Deadlines, Phase, overdue
from services.producer.core.generation import CUT_OFF
from services.producer.core.parts import End, Part, UpstreamFailure, UsagePart
from services.producer.core.registry import Candidate, Provider
from services.producer.core.retry import REFUSED, CallFailed, RetryPolicy
from services.producer.errors import Fenced
from services.producer.interruption import Interruption, StopKind, Stopped
from services.producer.journal import Journal
from services.producer.ports import Upstream, UpstreamRefused, UpstreamRequest, UpstreamStream
from services.producer.upstream_limits import UpstreamLimits

__all__ = ["Call", "CallContext", "deadline_message"]

log = structlog.get_logger()
STALL_SECONDS = 1.0
MODEL_LIMIT = 120  # characters of a model's name in a log line
_OPEN = UpstreamFailure("upstream_circuit_open", "the upstream's circuit is open: no call is made", recoverable=True)


class CallContext(msgspec.Struct, frozen=True):
    """Dependencies that all calls of a process share. ``of`` returns the upstream of a provider."""

    of: Callable[[Provider], Upstream]
    circuits: Circuits
    limits: UpstreamLimits
    retry: RetryPolicy
    deadlines: Deadlines


class Call:
    """Call one candidate once and append its answer to the journal.

    ``begun_at``: when the generation began, on the monotonic clock; the total deadline counts from there.
    ``was_made``: whether the provider was called; a limit or a circuit may prevent that.
    """

    def __init__(
        self,
        request: Request,
        candidate: Candidate,
        journal: Journal,
        context: CallContext,
        interruption: Interruption,
        clock: Clock,
        begun_at: float,
    ) -> None:
        self.was_made = False
        self._request = request
        self._candidate = candidate
        self._provider = candidate.provider
        self._journal = journal
        self._generation = journal.generation
        self._context = context
        self._interruption = interruption
        self._clock = clock
        # The request's own deadlines override the configured ones. Keep both: missing one of its own is not an outage.
        self._configured = context.deadlines.overridden(candidate.deadlines)
        self._deadlines = self._configured.overridden(request.deadlines)
        self._permit: Permit | None = None
        self._phase: Phase = "queued"
        self._begun_at = begun_at
        self._called_at = self._token_at = begun_at
        self._stalled = False

    def check_deadlines(self, now: float) -> None:
        """Interrupt the call or the generation if a deadline has passed at ``now``; append a notice about a stall."""
        code = overdue(
            self._deadlines,
            self._phase,
            now=now,
            begun=self._begun_at,
            called=self._called_at,
            token=self._token_at,
        )
        if code is not None:
            # Another call may still succeed where this one did not connect or brought no token in time.
            kind: StopKind = "attempt" if code in ("deadline_connect", "deadline_first_token") else "overdue"
            self._interruption.interrupt(kind, code)
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
                self._interruption.interrupt("lease", "lease_lost")

    async def run(self) -> None:
        """Make the call and relay its answer to the end.

        Raises:
            CallFailed: it brought no complete answer.
            Stopped: the generation was interrupted.
        """
        provider, request = self._provider, self._request
        limiter = self._context.limits.of(provider.name, provider.max_streams, provider.requests_per_minute)
        # Fail at once while the circuit is open, and do not wait for the limiter only to be refused behind it.
        if self._context.circuits.is_open(provider.name, self._candidate.upstream_model, request.tenant):
            raise self._failed(_OPEN)
        try:
            async with limiter.slot(request.priority, request.created_at):
                await self._connect()
        except asyncio.CancelledError:
            reason = self._interruption.take()
            if reason.kind != "attempt":
                raise Stopped(reason) from None
            # Only this call took too long: it fails as if the provider had failed it.
            failure = UpstreamFailure(reason.code, deadline_message(reason.code), recoverable=True)
            self._report_failure(failure)
            raise self._failed(failure) from None
        finally:
            self._phase = "queued"

    async def _connect(self) -> None:
        # Ask the circuit again: it may have opened while the call waited for the limiter.
        provider, model = self._provider, self._candidate.upstream_model
        permit = self._context.circuits.admit(provider.name, model, self._request.tenant)
        if permit is None:
            raise self._failed(_OPEN)
        self.was_made, self._permit = True, permit
        self._called_at = self._clock.monotonic()
        self._phase = "connecting"
        upstream_request = UpstreamRequest(
            model=model,
            messages=self._request.messages,
            params=self._request.params,
            connect_timeout=self._deadlines.connect,
        )
        try:
            async with self._context.of(provider).open(upstream_request) as stream:
                self._phase = "waiting"
                permit.connected()
                self._generation.begin_answer()
                await self._stream(stream)
        except UpstreamRefused as error:
            # An HTTP status proves the connection, also when it reports a failure of the model.
            if error.failure.upstream_status is not None:
                permit.connected()
            self._report_failure(error.failure, connected=error.connected)
            raise self._failed(error.failure) from error
        finally:
            permit.left()
        # A stream that ends without its end marker has failed, however much text it brought.
        ending = self._generation.ending
        if ending is None or isinstance(ending, UpstreamFailure):
            self._generation.ending = None
            self._report_failure(ending or CUT_OFF)
            raise self._failed(ending or CUT_OFF)
        permit.succeeded()

    async def _stream(self, stream: UpstreamStream) -> None:
        try:
            while True:
                parts = await stream.read()
                if parts is None:
                    return
                if parts:
                    await self._relay(parts)
                    if self._generation.ending is not None:
                        return
        except asyncio.CancelledError:
            # Cancelled by a client or a budget: some providers still report the usage of what they have generated.
            if self._provider.after_cancel == "drain" and self._interruption.allows_usage:
                await self._interruption.postpone(self._read_usage(stream), self._provider.drain_seconds)
            raise

    async def _relay(self, parts: list[Part]) -> None:
        events = self._generation.absorb(parts, self._journal.now())
        if not events:
            return
        # Notices are not tokens: they neither end the wait for the first token nor prove that the model works.
        if isinstance(events[0], Notice) and all(isinstance(event, Notice) for event in events):
            phase = self._phase
            self._phase = "queued"
            await self._journal.append(events)
            self._phase = phase
            return
        # Measure the gap, and close the circuit with the first token.
        now = self._clock.monotonic()
        if self._phase == "streaming":
            metrics.TOKEN_GAP.observe(now - self._token_at)
        else:
            metrics.FIRST_TOKEN.labels(self._provider.name).observe(now - self._called_at)
            metrics.ANSWERED_STAGE.observe(now - self._called_at)
            if self._permit is not None:
                self._permit.succeeded()
        self._stalled = False
        metrics.READS.inc()
        # Append. This waits while the publishing window is full. That is backpressure, not silence of the provider: the
        # deadline between tokens is suspended meanwhile.
        self._phase = "queued"
        await self._journal.append(events)
        self._phase = "streaming"
        self._token_at = self._clock.monotonic()

    async def _read_usage(self, stream: UpstreamStream) -> None:
        """Read on after a cancel, without relaying, until the provider reports its usage or its stream ends."""
        self._phase = "queued"
        while self._generation.usage is None:
            parts = await stream.read()
            if parts is None:
                return
            usage = [part for part in parts if isinstance(part, UsagePart)]
            self._generation.absorb(list(usage), self._journal.now())
            if any(isinstance(part, End | UpstreamFailure) for part in parts):
                return

    def _report_failure(self, failure: UpstreamFailure, *, connected: bool = True) -> None:
        """Report a failure before the first token to the circuits, unless the request's own deadline caused it."""
        if self._permit is not None and not self._generation.has_tokens and not self._is_own_deadline(failure):
            self._permit.failed(failure, connected=connected)

    def _is_own_deadline(self, failure: UpstreamFailure) -> bool:
        """Return whether the missed deadline is one that the request had set shorter than the configuration."""
        own, configured = self._deadlines, self._configured
        match failure.code:
            case "deadline_first_token":
                return own.first_token < configured.first_token
            case "deadline_connect":
                return own.connect < configured.connect
            case "upstream_unreachable":
                return own.connect < configured.connect and self._clock.monotonic() - self._called_at >= own.connect
            case _:
                return False

    def _failed(self, failure: UpstreamFailure) -> CallFailed:
        """Count a failure and return it as an exception; log one that lasts until an operator acts."""
        provider, model = self._provider.name, self._candidate.upstream_model
        metrics.UPSTREAM_ERRORS.labels(provider, failure.code).inc()
        if failure.code in REFUSED and not failure.recoverable:
            # A model that is not in the configuration may be a caller's mistake.
            if self._candidate.configured or failure.code != "upstream_not_found":
                metrics.REFUSALS.labels(provider, failure.code).inc()
            log.warning(
                "upstream refused",
                provider=provider,
                model=model[:MODEL_LIMIT],
                code=failure.code,
                upstream_status=failure.upstream_status,
                detail=failure.message,
            )
        return CallFailed(failure)


def deadline_message(code: str) -> str:
    """Return the message of a deadline's failure code, such as ``first token deadline passed``."""
    return f"{code.removeprefix('deadline_').replace('_', ' ')} deadline passed"
