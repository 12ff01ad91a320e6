"""Reserve budget for a generation at billing before it is queued."""

import math
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import structlog

from schemas.budgets import RELEASE_SUBJECT, RESERVE_SUBJECT, Decision, Release, Reserve, budgets_key
from schemas.requests import GenerationRecord
from schemas.topology import REGISTRY_BUCKET, bucket_stream
from services.delivery import metrics
from services.delivery.settings import Fallback
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["BudgetReservations", "worst_case"]

log = structlog.get_logger()
ASK_SECONDS: Final = 5.0
KNOWN_SECONDS: Final = 2.0
KNOWN_TENANTS: Final = 10_000
RETRY_SECONDS: Final = 2
MOST_OUTPUT: Final = 10**9  # beyond any model's output; a request may name any number
BYTES_PER_TOKEN: Final = 3
_OUTPUT_PARAMS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class BudgetReservations:
    """Reserve the worst-case usage of a generation; a tenant without budgets costs one look-up in two seconds.

    ``output``: output tokens assumed for a request that sets no maximum. ``fallback``: whether requests of tenants
    with budgets are refused or allowed while billing does not answer.
    """

    def __init__(self, broker: Broker, clock: Clock, *, output: int, fallback: Fallback) -> None:
        self._broker = broker
        self._clock = clock
        self._output = output
        self._fallback = fallback
        self._known: dict[str, tuple[float, bool]] = {}  # bounded by KNOWN_TENANTS

    async def reserve(
        self, record: GenerationRecord, models: list[str], request: Any, *, names_budget: bool = True
    ) -> None:
        """Reserve budget for a new generation.

        ``request`` has its ``messages`` and ``params``; ``models``: the candidate models, as ``provider/model``.
        ``names_budget``: whether a refusal may name the budget and its usage.

        Raises:
            Problem: 402, a budget has no room; 503, billing does not answer and ``fallback`` is ``refuse``.
            BrokerUnavailable: the broker does not answer.
        """
        if not await self._has_budgets(record.tenant):
            return
        inputs, outputs = worst_case(request.messages, request.params, self._output)
        reserve = Reserve(
            tenant=record.tenant,
            session=record.session,
            generation=record.generation,
            key=record.key,
            models=models,
            input=inputs,
            output=outputs,
            at=record.created_at,
        )
        decision = await self._ask(reserve)
        if decision is None:
            self._go_without_billing(record.tenant)
            return
        if not decision.admitted:
            metrics.BUDGETS.labels("refused").inc()
            raise _refusal(decision, self._clock.wall(), names_budget=names_budget)
        metrics.BUDGETS.labels("past_soft" if decision.budget else "admitted").inc()
        if decision.budget:
            log.warning("past a soft limit", tenant=record.tenant, budget=decision.budget, detail=decision.detail)

    async def release(self, record: GenerationRecord) -> None:
        """Release the reservation of a generation that could not be queued; unreleased ones expire."""
        if not self._known.get(record.tenant, (0.0, False))[1]:
            return
        release = Release(tenant=record.tenant, session=record.session, generation=record.generation)
        try:
            await self._broker.request(RELEASE_SUBJECT, msgspec.json.encode(release))
        except BrokerUnavailable as error:
            log.warning("reservation not released yet", generation=record.generation, detail=str(error))

    async def _ask(self, reserve: Reserve) -> Decision | None:
        try:
            answer = await self._broker.request(RESERVE_SUBJECT, msgspec.json.encode(reserve), timeout=ASK_SECONDS)
            return None if answer is None else msgspec.json.decode(answer, type=Decision)
        except BrokerUnavailable:
            if not self._broker.is_connected:
                raise
            return None  # billing runs, but its database does not answer
        except msgspec.DecodeError:
            log.error("billing's decision is not readable", generation=reserve.generation)
            return None

    def _go_without_billing(self, tenant: str) -> None:
        metrics.BUDGETS.labels("unanswered").inc()
        if self._fallback == "allow":
            log.warning("billing does not answer: admitted without its budgets", tenant=tenant)
            return
        raise Problem(
            503,
            "billing does not answer, and this tenant's budgets allow nothing without it",
            slug="budget-unknown",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )

    async def _has_budgets(self, tenant: str) -> bool:
        now = self._clock.monotonic()
        known = self._known.get(tenant)
        if known is not None and now - known[0] < KNOWN_SECONDS:
            return known[1]
        subject = f"$KV.{REGISTRY_BUCKET}.{budgets_key(tenant)}"
        stored = await self._broker.last(bucket_stream(REGISTRY_BUCKET), subject)
        if len(self._known) >= KNOWN_TENANTS:
            self._known.clear()
        found = stored is not None and bool(stored.data)
        self._known[tenant] = (now, found)
        return found


def worst_case(messages: Any, params: dict[str, Any], output: int) -> tuple[int, int]:
    """Return the maximum input and output tokens of a request: input from its size, output from its parameters.

    ``output``: used if the request sets no maximum.
    """
    size = len(msgspec.json.encode([messages, params.get("tools"), params.get("response_format")]))
    allowed = [v for v in (params.get(name) for name in _OUTPUT_PARAMS) if type(v) is int and v > 0]
    choices = params.get("n")
    times = choices if type(choices) is int and choices > 0 else 1
    outputs = (max(allowed) if allowed else output) * times
    return math.ceil(size / BYTES_PER_TOKEN), min(outputs, MOST_OUTPUT)


def _refusal(decision: Decision, now: float, *, names_budget: bool) -> Problem:
    detail = "a budget of the tenant has no room for this"
    if names_budget:
        detail = decision.detail or f"budget {decision.budget!r} has no room for this"
    headers = {}
    if decision.until is not None:
        ends = datetime.fromtimestamp(decision.until, UTC)
        detail += f"; its period ends at {ends:%Y-%m-%dT%H:%M:%SZ}"
        headers["Retry-After"] = str(max(1, math.ceil(decision.until - now)))
    return Problem(402, detail, slug="budget-exceeded", title="The budget is used up", headers=headers)
