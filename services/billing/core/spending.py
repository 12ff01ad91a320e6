"""Usage of settled generations, summed by the day of their start; the stored sums are moved by steps.

A generation is included from its settlement on; until then its budget reservation counts instead.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

from services.billing.core.generation import Generation, Key
from services.billing.core.money import ZERO

__all__ = ["DAY", "OPEN", "DIMENSIONS", "SUMS", "SpendingKey", "Step", "Sums", "released", "settled", "steps"]

DAY: Final = 86_400_000
"""One day in milliseconds."""
OPEN: Final = ("running", "awaiting_provider")
"""Statuses of generations that have not settled."""


class SpendingKey(NamedTuple):
    """The key of the sums that a generation belongs to. ``day``: days since 1970, UTC."""

    tenant: str
    credential: str
    day: int
    provider: str
    model: str
    status: str
    currency: str


class Sums(NamedTuple):
    """Sums of usage: ``tokens`` and ``amount`` as charged, the other fields as counted and reported."""

    generations: int = 0
    tokens: int = 0
    amount: Decimal = ZERO
    input: int = 0
    output: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    reasoning: int = 0
    counted_input: int = 0
    counted_output: int = 0
    drift: int = 0
    unpriced: int = 0


DIMENSIONS: Final = SpendingKey._fields
SUMS: Final = Sums._fields
_NOTHING: Final = Sums()


class Step(NamedTuple):
    """A difference to add to the sums of one key."""

    key: SpendingKey
    sums: Sums


def settled(g: Generation) -> bool:
    """Return whether a generation has settled, so that it counts as used."""
    return g.status not in OPEN


def released(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Key]:
    """Return the generations that are newly settled: their reservations are released."""
    return [g.key for g in after if settled(g) and not ((old := before.get(g.key)) is not None and settled(old))]


def steps(before: Mapping[Key, Generation], after: Iterable[Generation]) -> list[Step]:
    """Return the steps that move the sums from the generations ``before`` to those ``after``."""
    found: dict[SpendingKey, Sums] = {}
    for g in after:
        _add(found, g, 1)
        old = before.get(g.key)
        if old is not None:
            _add(found, old, -1)
    return [Step(key, found[key]) for key in sorted(found) if found[key] != _NOTHING]


def _add(found: dict[SpendingKey, Sums], g: Generation, sign: int) -> None:
    if not settled(g):
        return
    key = SpendingKey(g.tenant, g.credential, g.started_at // DAY, g.provider, g.model, g.status, g.currency)
    known: tuple[Any, ...] = found.get(key, _NOTHING)
    more: tuple[Any, ...] = _sums(g)
    found[key] = Sums(*(was + sign * one for was, one in zip(known, more, strict=True)))


def _sums(g: Generation) -> Sums:
    return Sums(
        generations=1,
        tokens=g.tokens,
        amount=g.amount,
        input=g.input or 0,
        output=g.output or 0,
        cached_input=g.cached_input or 0,
        cache_write=g.cache_write or 0,
        cache_write_1h=g.cache_write_1h or 0,
        reasoning=g.reasoning or 0,
        counted_input=g.counted_input,
        counted_output=g.counted_output,
        drift=g.drift_output or 0,
        unpriced=g.pricing == "unpriced",
    )
