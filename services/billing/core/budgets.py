"""Budgets: limits on the usage of a tenant or a credential in a day or a month, and the admission of generations."""

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
    """A limit on usage in each ``period`` (UTC).

    ``key``: the credential that it covers; empty: the whole tenant. ``unit``: ``tokens``, or a currency such as
    ``USD``. Above ``soft`` generations are admitted with a warning, above ``hard`` they are refused; at least one of
    them is set.
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
            raise ValueError("a budget must have a soft or a hard limit, or both")
        if any(not limit.is_finite() or limit < 0 for limit in limits):
            raise ValueError("a limit must not be negative")
        if self.soft is not None and self.hard is not None and self.soft > self.hard:
            raise ValueError(f"the soft limit {self.soft} is above the hard limit {self.hard}")

    def covers(self, key: str) -> bool:
        """Return whether the budget covers this credential."""
        return self.key in ("", key)


class Need(NamedTuple):
    """The largest possible usage of a generation: tokens, and money by currency where its models have prices."""

    tokens: int
    money: dict[str, Decimal]

    def of(self, unit: str) -> Decimal:
        """Return the usage in the unit of a budget."""
        return Decimal(self.tokens) if unit == TOKENS else self.money.get(unit, ZERO)


class Standing(NamedTuple):
    """The usage of a budget in its current period: settled (``spent``), and reserved for open generations."""

    budget: Budget
    spent: Decimal
    reserved: Decimal

    @property
    def used(self) -> Decimal:
        """Return the sum of spent and reserved."""
        return self.spent + self.reserved


class Verdict(NamedTuple):
    """An admission decision. ``refused``: the budget without room. ``passed``: the first one whose soft limit is
    exceeded by this generation.
    """

    refused: Standing | None
    passed: Standing | None


def period_at(period: Period, at: int) -> tuple[int, int]:
    """Return the first millisecond (since 1970) of the day or month of ``at``, in UTC, and of the next one."""
    day = datetime.fromtimestamp(at / 1_000, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        first, after = day, day + timedelta(days=1)
    else:
        first = day.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    return round(first.timestamp() * 1_000), round(after.timestamp() * 1_000)


def need_of(reserve: Reserve, book: PriceBook, at: int) -> Need:
    """Return the largest possible usage of a generation, by the most expensive of its candidate models.

    A model without a price needs no money: its generation ends as ``unpriced``.
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
"""Token classes that one reserved token may be billed as."""


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
    """Decide whether one more generation fits into all of the budgets that cover it."""
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
    """The usage so far of a running generation, and its reservation, in the unit of a budget."""

    generation_key: tuple[str, str, str]
    key: str
    used: Decimal
    reserved: Decimal


def beyond(standing: Standing, uses: list[Use]) -> list[tuple[str, str, str]]:
    """Return the running generations to stop at the hard limit: all of them when it is used up; those above their
    reservation when their excess no longer fits beside the other reservations.
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
    """A generation that used more than budgets had accounted for, in one unit.

    ``expected``: its reservation, or its charge before a correction.
    """

    generation: Generation
    unit: str
    expected: Decimal
    used: Decimal


def overruns(settled: Iterable[Generation], reserved: Mapping[Key, Mapping[str, Decimal]]) -> list[Overrun]:
    """Return the generations that used more than their reservation.

    ``reserved``: reservations by generation and unit; generations without one are skipped.
    """
    return [over for g in settled if g.key in reserved for over in _above(g, reserved[g.key])]


def corrected(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Overrun]:
    """Return the settled generations whose charge has grown since."""
    known = [(before[g.key], g) for g in after if g.key in before and before[g.key].status not in OPEN]
    return [over for old, g in known for over in _above(g, _used(old))]


def _above(g: Generation, expected: Mapping[str, Decimal]) -> list[Overrun]:
    used = _used(g).items()
    return [Overrun(g, unit, expected.get(unit, ZERO), n) for unit, n in used if n > expected.get(unit, ZERO)]


def _used(g: Generation) -> dict[str, Decimal]:
    return {TOKENS: Decimal(g.tokens)} | ({g.currency: g.amount} if g.currency else {})
