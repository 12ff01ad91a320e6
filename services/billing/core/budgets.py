"""Budgets: what a tenant or a credential may use in a day or a month, and whether one more generation fits in."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from schemas.budgets import Reserve
from schemas.names import NAME_PATTERN
from services.billing.core.generation import Generation, Key
from services.billing.core.money import ZERO, AmountTooLarge, times
from services.billing.core.prices import Price, PriceBook, TokenClass
from services.billing.core.spending import OPEN

__all__ = [
    "TOKENS",
    "Budget",
    "Need",
    "Overrun",
    "Period",
    "Standing",
    "Use",
    "Verdict",
    "admit",
    "beyond",
    "corrected",
    "need_of",
    "overruns",
    "period_at",
]

TOKENS: Final = "tokens"
Period = Literal["day", "month"]
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Unit = Annotated[str, msgspec.Meta(pattern="^(tokens|[A-Z]{3})$")]


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on what may be used in each ``period`` (UTC).

    ``key``: of one credential; empty: of the whole tenant. ``unit``: ``tokens``, or a currency such as ``USD``. Past
    ``soft`` everybody is told, ``hard`` is not passed; at least one of them is set.
    """

    tenant: str
    name: Name
    period: Period
    unit: Unit
    soft: Decimal | None = None
    hard: Decimal | None = None
    key: str = ""

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.soft, self.hard) if limit is not None]
        if not limits:
            raise ValueError("a budget has a soft or a hard limit, or both")
        if any(not limit.is_finite() or limit < 0 for limit in limits):
            raise ValueError("a limit is not negative")
        if self.soft is not None and self.hard is not None and self.soft > self.hard:
            raise ValueError(f"the soft limit {self.soft} is above the hard limit {self.hard}")

    def covers(self, key: str) -> bool:
        """Tell whether it bounds what this credential uses."""
        return self.key in ("", key)


class Need(NamedTuple):
    """The most that a generation may use: tokens, and money by currency where its models have prices."""

    tokens: int
    money: dict[str, Decimal]

    def of(self, unit: str) -> Decimal:
        """Return it in the unit of a budget."""
        return Decimal(self.tokens) if unit == TOKENS else self.money.get(unit, ZERO)


class Standing(NamedTuple):
    """Where a budget stands in its period: settled, and reserved by what has not ended."""

    budget: Budget
    spent: Decimal
    reserved: Decimal

    @property
    def used(self) -> Decimal:
        """What is gone or may go."""
        return self.spent + self.reserved


class Verdict(NamedTuple):
    """``refused``: the budget that has no room. ``passed``: one whose soft limit is passed with this generation."""

    refused: Standing | None
    passed: Standing | None


def period_at(period: Period, at: int) -> tuple[int, int]:
    """Return first and one past the last millisecond (since 1970) of the day or month of ``at``, in UTC."""
    day = datetime.fromtimestamp(at / 1_000, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        first, after = day, day + timedelta(days=1)
    else:
        first = day.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    return round(first.timestamp() * 1_000), round(after.timestamp() * 1_000)


def need_of(reserve: Reserve, book: PriceBook, at: int) -> Need:
    """Return the most that a generation may use: of the models that may answer, the dearest one counts.

    A model without a price needs no money: its generation is ``unpriced`` in the end, too.
    """
    money: dict[str, Decimal] = {}
    for name in reserve.models:
        provider, _, model = name.partition("/")
        for currency, amount in _cost(reserve, provider, model, book, at).items():
            money[currency] = max(money.get(currency, ZERO), amount)
    return Need(reserve.input + reserve.output, money)


_DEAREST: Final[tuple[tuple[TokenClass, ...], ...]] = (
    ("input", "cache_write", "cache_write_1h"),
    ("output", "reasoning"),
    ("per_request",),
)
"""Classes that the same token may turn out to be of."""


def _cost(reserve: Reserve, provider: str, model: str, book: PriceBook, at: int) -> dict[str, Decimal]:
    cost: dict[str, Decimal] = {}
    for classes, count in zip(_DEAREST, (reserve.input, reserve.output, 1), strict=True):
        prices = [p for p in (book.price(provider, model, c, at) for c in classes) if p is not None]
        if prices:
            price = max(prices, key=lambda p: p.amount)
            cost[price.currency] = cost.get(price.currency, ZERO) + _amount(count, price)
    return cost


def _amount(count: int, price: Price) -> Decimal:
    each = price.token_class == "per_request"  # noqa: S105  # not that kind of token
    try:
        return times(count, price.amount, per_million=not each)
    except AmountTooLarge as error:
        return error.amount


def admit(standings: list[Standing], need: Need) -> Verdict:
    """Return whether one more generation fits into all of the budgets that cover it."""
    passed: Standing | None = None
    for standing in standings:
        budget = standing.budget
        after = standing.used + need.of(budget.unit)
        if budget.hard is not None and (after > budget.hard or standing.used >= budget.hard):
            return Verdict(standing, None)
        if budget.soft is not None and after > budget.soft and passed is None:
            passed = standing
    return Verdict(None, passed)


class Use(NamedTuple):
    """What a running generation has used so far, and what was reserved for it, in the unit of a budget."""

    generation_key: tuple[str, str, str]
    key: str
    used: Decimal
    reserved: Decimal


def beyond(standing: Standing, uses: list[Use]) -> list[tuple[str, str, str]]:
    """Return the running generations that a hard limit stops: every one when it is used up; those that use more than
    was reserved for them when there is less left than others have reserved.
    """
    budget = standing.budget
    if budget.hard is None:
        return []
    covered = [use for use in uses if budget.covers(use.key)]
    if standing.spent + sum((use.used for use in covered), ZERO) >= budget.hard:
        return [use.generation_key for use in covered]
    extra = sum((max(ZERO, use.used - use.reserved) for use in covered), ZERO)
    if standing.used + extra <= budget.hard:
        return []
    return [use.generation_key for use in covered if use.used > use.reserved]


class Overrun(NamedTuple):
    """A generation that used more than budgets knew of, in one unit.

    ``expected``: what was reserved for it, or charged before a correction.
    """

    generation: Generation
    unit: str
    expected: Decimal
    used: Decimal


def overruns(settled: Iterable[Generation], reserved: Mapping[Key, Mapping[str, Decimal]]) -> list[Overrun]:
    """Return which generations used more than was reserved for them.

    ``reserved``: what was, by generation and unit; those that are not in it had no reservation.
    """
    return [over for g in settled if g.key in reserved for over in _above(g, reserved[g.key])]


def corrected(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Overrun]:
    """Return which generations that had settled before have been charged more since then."""
    known = [(before[g.key], g) for g in after if g.key in before and before[g.key].status not in OPEN]
    return [over for old, g in known for over in _above(g, _used(old))]


def _above(g: Generation, expected: Mapping[str, Decimal]) -> list[Overrun]:
    used = _used(g).items()
    return [Overrun(g, unit, expected.get(unit, ZERO), n) for unit, n in used if n > expected.get(unit, ZERO)]


def _used(g: Generation) -> dict[str, Decimal]:
    return {TOKENS: Decimal(g.tokens)} | ({g.currency: g.amount} if g.currency else {})
