"""Call candidates in order: retry one as its policy allows, and fail over to the next one."""

import asyncio
from collections.abc import Awaitable

import tenacity

from schemas.events import AbandonedCall, AnyEvent
from schemas.requests import Request
from services.kit.clock import Clock
from services.producer import metrics
from services.producer.call import Call, CallContext
from services.producer.core.parts import UpstreamFailure
from services.producer.core.registry import Candidate, Provider
from services.producer.core.retry import CallFailed, helps_elsewhere
from services.producer.interruption import Interruption, Stopped
from services.producer.journal import Journal

__all__ = ["Attempts"]


class Attempts:
    """Make the calls of one generation until one brings a complete answer.

    ``provider``: the last one called. ``abandoned``: calls that were abandoned after their answer had begun, with their
    providers; at most as many as attempts are allowed.
    """

    def __init__(
        self, request: Request, journal: Journal, context: CallContext, interruption: Interruption, clock: Clock
    ) -> None:
        self.provider: Provider | None = None
        self.abandoned: list[tuple[AbandonedCall, Provider]] = []
        self._request = request
        self._journal = journal
        self._generation = journal.generation
        self._context = context
        self._interruption = interruption
        self._clock = clock
        self._begun_at = clock.monotonic()
        self._call: Call | None = None  # the running call, or the last one
        self._made = 0  # calls made; a limit or a circuit may prevent a call

    def check_deadlines(self, now: float) -> None:
        """Check the deadlines of the current call at ``now`` (monotonic seconds)."""
        if self._call is not None:
            self._call.check_deadlines(now)

    async def run(self, candidates: list[Candidate]) -> list[AnyEvent]:
        """Call the candidates in order until one answers; return the closing events.

        Raises:
            Stopped: the generation was interrupted.
        """
        failure: UpstreamFailure | None = None
        with self._interruption.covering():
            for number, candidate in enumerate(candidates):
                # Skip candidates that the configuration excludes from failover.
                if failure is not None and not candidate.failover:
                    continue
                if number and failure is not None:
                    await self._fail_over(candidate, failure)
                failure = await self._try_candidate(candidate)
                # Fail over only before the first token, and only where the request itself is not at fault.
                if failure is None or self._generation.has_tokens or not helps_elsewhere(failure):
                    break
        if failure is not None:
            return self._generation.fail(failure, self._journal.now())
        return self._generation.end(self._journal.now())

    async def _fail_over(self, candidate: Candidate, failure: UpstreamFailure) -> None:
        """Abandon the failed call and announce the next candidate in the log."""
        call = self._abandon(failure)
        self._generation.provider = candidate.provider.name
        self._generation.upstream_model = candidate.upstream_model
        metrics.FAILOVERS.labels(candidate.provider.name).inc()
        at = self._journal.now()
        attempt = self._made + 1
        notice = self._generation.notice("failover", failure.message, at, attempt=attempt, call=call)
        await self._interruptible(self._journal.append([notice]))

    def _abandon(self, failure: UpstreamFailure) -> AbandonedCall | None:
        """Abandon the failed call for another one; keep its count and usage for billing."""
        call = self._generation.abandon_call(failure)
        if call is not None and self.provider is not None:
            self.abandoned.append((call, self.provider))
            metrics.TOKENS.inc(call.counted.output)
        return call

    async def _try_candidate(self, candidate: Candidate) -> UpstreamFailure | None:
        """Call one candidate as often as the retry policy allows; return its failure, or ``None``."""
        policy = self._context.retry

        def may_retry(error: BaseException) -> bool:
            return isinstance(error, CallFailed) and policy.retries(error.failure) and self._may_call_again()

        async def announce(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, CallFailed) and state.next_action is not None:
                await self._announce_retry(candidate, error.failure, state.next_action.sleep)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(policy.max_attempts),
            wait=policy.pause,
            retry=tenacity.retry_if_exception(may_retry),
            before_sleep=announce,
            sleep=self._back_off,
            reraise=True,
        )
        try:
            await retrying(self._make_call, candidate)
        except CallFailed as error:
            return error.failure
        return None

    async def _make_call(self, candidate: Candidate) -> None:
        call = self._call = Call(
            self._request,
            candidate,
            self._journal,
            self._context,
            self._interruption,
            self._clock,
            self._begun_at,
        )
        try:
            await call.run()
        finally:
            if call.was_made:
                self._made += 1
                self.provider = candidate.provider

    def _may_call_again(self) -> bool:
        """Return whether to retry: always before the first token, after it only where the request allows a restart."""
        return not self._generation.has_tokens or self._request.on_producer_loss == "restart"

    async def _announce_retry(self, candidate: Candidate, failure: UpstreamFailure, pause: float) -> None:
        """Append a notice of the retry, or ``restarted`` in a new epoch if tokens must be revoked."""
        metrics.RETRIES.labels(candidate.provider.name, failure.code).inc()
        if self._generation.has_tokens:
            # The first append of an epoch is conditional on the end of the log, so that must be known.
            await self._interruptible(self._journal.confirm())
            call = self._abandon(failure)
            event: AnyEvent = self._generation.begin_anew("upstream_failed", call, self._journal.now())
        else:
            at, attempt = self._journal.now(), self._made + 1
            call = self._abandon(failure)
            event = self._generation.notice(
                "retrying", failure.message, at, attempt=attempt, delay=round(pause, 3), call=call
            )
        await self._interruptible(self._journal.append([event]))

    async def _back_off(self, seconds: float) -> None:
        await self._interruptible(asyncio.sleep(seconds))

    async def _interruptible(self, work: Awaitable[None]) -> None:
        """Await ``work`` between two calls.

        Raises:
            Stopped: the generation was interrupted meanwhile.
        """
        try:
            await work
        except asyncio.CancelledError:
            raise Stopped(self._interruption.take()) from None
