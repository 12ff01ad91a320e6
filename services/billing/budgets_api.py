"""The HTTP API: budgets and their standings."""

import time
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, put
from litestar.datastructures import State
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, PathParameter

from schemas.names import InvalidName, check_name
from services.billing.adapters.budgets import Budgets
from services.billing.admission import Admission
from services.billing.core.budgets import Budget, Period, Standing, period_at
from services.billing.core.money import render
from services.kit.auth.guards import REFUSALS, caller, needs
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem, ProblemDetails

__all__ = ["delete_budget", "list_budgets", "put_budget", "show_budget"]

_PROBLEM = "application/problem+json"
_PROBLEMS = {
    400: ResponseSpec(ProblemDetails, description="Not valid", media_type=_PROBLEM),
    **REFUSALS,
    503: ResponseSpec(ProblemDetails, description="The database or the broker does not answer", media_type=_PROBLEM),
}
_NOT_FOUND = {404: ResponseSpec(ProblemDetails, description="There is no such budget", media_type=_PROBLEM)}
_EXAMPLE = {"period": "month", "unit": "USD", "soft": "80", "hard": "100"}
Name = Annotated[str, PathParameter(examples=[Example(value="monthly")])]


class BudgetSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A limit on usage in each day or month (UTC).

    ``unit``: ``tokens``, or a currency such as ``USD``. Limits are decimal numbers as text; above ``soft`` generations
    begin with a warning, above ``hard`` they are refused. ``key``: only this credential's usage; empty: the whole
    tenant's.
    """

    period: Period
    unit: str
    soft: str | None = None
    hard: str | None = None
    key: Annotated[str, msgspec.Meta(max_length=200)] = ""


class BudgetView(msgspec.Struct, kw_only=True):
    """A budget and its usage: ``spent`` is settled, ``reserved`` for generations that have not ended, ``left`` of
    ``hard``.

    ``since`` and ``until`` bound the current period, in seconds since 1970.
    """

    name: str
    period: Period
    unit: str
    soft: str | None
    hard: str | None
    key: str
    spent: str
    reserved: str
    left: str | None
    since: float
    until: float


class BudgetList(msgspec.Struct):
    """A tenant's budgets, sorted by name."""

    budgets: list[BudgetView]


@get(
    "/",
    summary="Budgets and where they stand",
    operation_id="list_budgets",
    tags=["budgets"],
    responses=_PROBLEMS,
    **needs("usage"),
)
async def list_budgets(request: Request[Any, Any, Any], state: State) -> BudgetList:
    """All budgets of the tenant. Credentials restricted to some sessions see only their own budgets."""
    principal, now = caller(request), _now()
    standings = await _budgets(state).standings(principal.tenant, now)
    return BudgetList([_view(s, now) for s in standings if _sees(principal, s.budget)])


@get(
    "/{name:str}",
    summary="One budget and its usage",
    operation_id="show_budget",
    tags=["budgets"],
    responses={**_PROBLEMS, **_NOT_FOUND},
    **needs("usage"),
)
async def show_budget(request: Request[Any, Any, Any], state: State, name: Name) -> BudgetView:
    """The settled usage, and the reservations of generations that have not ended."""
    principal, now = caller(request), _now()
    standings = await _budgets(state).standings(principal.tenant, now, _name(name))
    if not standings or not _sees(principal, standings[0].budget):
        raise Problem(404, f"there is no budget {name!r}")
    return _view(standings[0], now)


@put(
    "/{name:str}",
    summary="Set a budget",
    operation_id="put_budget",
    tags=["budgets"],
    responses={201: ResponseSpec(BudgetView, description="It is new"), **_PROBLEMS},
    **needs("admin"),
)
async def put_budget(
    request: Request[Any, Any, Any],
    state: State,
    name: Name,
    data: Annotated[BudgetSpec, Body(examples=[Example(summary="100 dollars a month", value=_EXAMPLE)])],
) -> Response[BudgetView]:
    """Takes effect for requests from now on; generations beyond a lowered hard limit are stopped."""
    tenant, now = _tenant_of_all(caller(request)), _now()
    budget = _budget(tenant, _name(name), data)
    is_new = await _budgets(state).put(budget, now)
    await _notify(state, tenant)
    (standing,) = await _budgets(state).standings(tenant, now, name)
    return Response(_view(standing, now), status_code=201 if is_new else 200)


@delete(
    "/{name:str}",
    status_code=204,
    summary="Remove a budget",
    operation_id="delete_budget",
    tags=["budgets"],
    responses={**_PROBLEMS, **_NOT_FOUND},
    **needs("admin"),
)
async def delete_budget(request: Request[Any, Any, Any], state: State, name: Name) -> None:
    """Reservations and usage are still counted, for other budgets and for one set later."""
    tenant = _tenant_of_all(caller(request))
    if not await _budgets(state).delete(tenant, _name(name)):
        raise Problem(404, f"there is no budget {name!r}")
    await _notify(state, tenant)


def _sees(principal: Principal, budget: Budget) -> bool:
    """Return whether the caller may see a budget: its own, or any if it may see the whole tenant."""
    return principal.reaches_all or budget.key == principal.key != ""


def _tenant_of_all(principal: Principal) -> str:
    """Return the tenant of a caller that may change limits on all of its sessions.

    Raises:
        Problem: 403.
    """
    if not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions, and a budget covers all of them")
    return principal.tenant


async def _notify(state: State, tenant: str) -> None:
    admission: Admission | None = state.get("admission")
    if admission is None:
        return
    try:
        await admission.notify(tenant, has_budgets=bool(await _budgets(state).standings(tenant, _now())))
    except BrokerUnavailable as error:
        raise Problem(503, "the budget is stored, but delivery has not been notified: set it again") from error


def _budgets(state: State) -> Budgets:
    budgets: Budgets = state["budgets"]
    return budgets


def _name(name: str) -> str:
    try:
        return check_name("budget", name)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


def _budget(tenant: str, name: str, spec: BudgetSpec) -> Budget:
    try:
        fields = msgspec.structs.asdict(spec) | {"soft": _limit(spec.soft), "hard": _limit(spec.hard)}
        return msgspec.convert(Budget(tenant=tenant, name=name, **fields), Budget, from_attributes=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise Problem(400, str(error)) from error


def _limit(text: str | None) -> Decimal | None:
    if text is None:
        return None
    try:
        limit = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"limit {text[:40]!r} is not a decimal number such as 12.50") from None
    if len(text) > 40 or not limit.is_finite() or -int(limit.as_tuple().exponent) > 12:
        raise ValueError(f"limit {text[:40]!r} has more than 40 characters or 12 places")
    return limit


def _view(standing: Standing, now: int) -> BudgetView:
    budget = standing.budget
    since, until = period_at(budget.period, now)
    return BudgetView(
        name=budget.name,
        period=budget.period,
        unit=budget.unit,
        soft=None if budget.soft is None else render(budget.soft),
        hard=None if budget.hard is None else render(budget.hard),
        key=budget.key,
        spent=render(standing.spent),
        reserved=render(standing.reserved),
        left=None if budget.hard is None else render(max(Decimal(0), budget.hard - standing.used)),
        since=since / 1_000,
        until=until / 1_000,
    )


def _now() -> int:
    return round(time.time() * 1_000)
