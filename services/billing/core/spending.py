"""What each tenant and credential has used, by the day on which its generations started: kept as sums, moved by steps.

A generation counts from when it is settled; until then what was reserved for it stands in its place.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Final, NamedTuple

from services.billing.core.generation import Generation, Key
from services.billing.core.money import ZERO

__all__ = ["DAY", "Step", "released", "settled", "steps"]

DAY: Final = 86_400_000
"""Milliseconds."""
_OPEN: Final = ("running", "awaiting_provider")


class Step(NamedTuple):
    """What is to be added to one sum. ``day``: days since 1970, UTC."""

    tenant: str
    credential: str
    day: int
    currency: str
    tokens: int
    amount: Decimal


def settled(g: Generation) -> bool:
    """Tell whether a generation counts as used."""
    return g.status not in _OPEN


def released(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Key]:
    """Return the generations that count as used from now on: what was reserved for them is free."""
    return [g.key for g in after if settled(g) and not ((old := before.get(g.key)) is not None and settled(old))]


def steps(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Step]:
    """Return what moves the sums from the generations as they were to the generations as they are."""
    sums: dict[tuple[str, str, int, str], tuple[int, Decimal]] = {}
    for g in after:
        _add(sums, g, 1)
        old = before.get(g.key)
        if old is not None:
            _add(sums, old, -1)
    return [Step(*place, *sums[place]) for place in sorted(sums) if sums[place] != (0, ZERO)]


def _add(sums: dict[tuple[str, str, int, str], tuple[int, Decimal]], g: Generation, sign: int) -> None:
    if settled(g) and (g.tokens or g.amount):
        place = (g.tenant, g.credential, g.started_at // DAY, g.currency)
        tokens, amount = sums.get(place, (0, ZERO))
        sums[place] = (tokens + sign * g.tokens, amount + sign * g.amount)
