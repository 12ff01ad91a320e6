"""Overruns: usage beyond its reservation is counted and logged, with an alarm if it exceeds a hard limit."""

from collections.abc import Sequence

import structlog

from services.billing import metrics
from services.billing.adapters.budgets import Budgets
from services.billing.core.budgets import TOKENS, Overrun
from services.billing.core.money import render
from services.billing.errors import LedgerUnavailable

__all__ = ["report_limits", "report_overruns"]

log = structlog.get_logger()


async def report_overruns(budgets: Budgets, found: Sequence[Overrun]) -> None:
    """Count and log settlements that used more than their reservation, and the hard limits they exceed."""
    for one in found:
        kind = "tokens" if one.unit == TOKENS else "money"
        metrics.OVERRUNS.labels(kind).inc()
        metrics.OVERRUN_AMOUNT.labels(one.unit).inc(float(one.used - one.expected))
        log.warning("used more than was reserved", **_fields(one))
    await report_limits(budgets, found)


async def report_limits(budgets: Budgets, found: Sequence[Overrun]) -> None:
    """Count and log the hard limits exceeded by this usage."""
    for one in found:
        try:
            await _report_limit(budgets, one)
        except LedgerUnavailable as error:
            log.warning("budgets not checked", generation=one.generation.generation, error=str(error))


async def _report_limit(budgets: Budgets, one: Overrun) -> None:
    g = one.generation
    for budget, spent, _reserved in await budgets.standings(g.tenant, g.started_at):
        if budget.hard is None or budget.unit != one.unit or not budget.covers(g.credential) or spent <= budget.hard:
            continue
        metrics.LIMITS_PASSED.inc()
        log.error(
            "a hard limit was passed by usage beyond its reservation",
            budget=budget.name,
            limit=render(budget.hard),
            spent=render(spent),
            **_fields(one),
        )


def _fields(one: Overrun) -> dict[str, str]:
    g = one.generation
    return {
        "tenant": g.tenant,
        "session": g.session,
        "generation": g.generation,
        "model": f"{g.provider}/{g.upstream_model or g.model}",
        "unit": one.unit,
        "expected": render(one.expected),
        "used": render(one.used),
    }
