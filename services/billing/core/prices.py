"""The price book: which price holds for which tokens of which model, and when.

A price is found for each token class by itself: of the rows that match provider and model and are valid at the
generation's start, the most specific one. A provider by its name beats a pattern; then a model by its name beats a
pattern; then the pattern with more literal characters wins; of equal ones the one that became valid last. A class
without a price as specific as that of the class it is part of goes by that one: cached input and cache writes by
``input``, writes for an hour by ``cache_write``, reasoning by ``output``.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Final, Literal, NamedTuple, get_args

import msgspec

__all__ = ["CLASSES", "PARENTS", "PER_REQUEST", "TOKEN_CLASSES", "Price", "PriceBook", "PriceKey", "TokenClass", "glob"]

TokenClass = Literal["input", "cached_input", "cache_write", "cache_write_1h", "output", "reasoning", "per_request"]
CLASSES: Final[tuple[TokenClass, ...]] = get_args(TokenClass)
PER_REQUEST: Final = "per_request"
TOKEN_CLASSES: Final = tuple(c for c in CLASSES if c != PER_REQUEST)
PARENTS: Final[dict[TokenClass, TokenClass]] = {
    "cached_input": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "reasoning": "output",
}
"""A parent precedes its parts in `CLASSES`."""
_REMEMBERED: Final = 10_000
"""Bound of provider and model pairs whose rows are kept at hand."""


class PriceKey(NamedTuple):
    """What a price is a price of; the rest of a row is what it says."""

    provider: str
    model: str
    token_class: str
    valid_from: int


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """One dated row. Amount in ``currency`` per 1,000,000 tokens, for ``per_request`` per request.

    ``provider`` and ``model`` may hold ``*`` and ``?``. Valid from ``valid_from`` up to, not including, ``valid_until``
    (``None``: without end), in milliseconds since 1970. ``id`` is the database's, 0 before it is kept there.
    """

    provider: str
    model: str
    token_class: TokenClass
    currency: str
    amount: Decimal
    valid_from: int
    valid_until: int | None = None
    id: int = 0

    @property
    def key(self) -> PriceKey:
        """What it is a price of."""
        return PriceKey(self.provider, self.model, self.token_class, self.valid_from)

    def says(self) -> tuple[object, ...]:
        """Return all that two rows must share to be the same."""
        return (*self.key, self.currency, self.amount.normalize(), self.valid_until)

    def valid(self, at: int) -> bool:
        """Tell whether it holds at ``at``."""
        return self.valid_from <= at and (self.valid_until is None or at < self.valid_until)

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """How specific it is; the larger wins."""
        return (
            not _has_wildcard(self.provider),
            not _has_wildcard(self.model),
            _literals(self.model),
            _literals(self.provider),
        )


class PriceBook:
    """The rows that hold now, under a revision number that grows with every change."""

    def __init__(self, revision: int = 0, prices: Sequence[Price] = ()) -> None:
        self.revision = revision
        self.prices = tuple(prices)
        # The best first, so that the first valid one is the answer; ties go to the later, then to the text.
        self._ranked = sorted(self.prices, key=lambda p: (p.rank, p.valid_from, p.model, p.provider), reverse=True)
        self._matching = lru_cache(_REMEMBERED)(self._find)

    def price(self, provider: str, model: str, token_class: TokenClass, at: int) -> Price | None:
        """Return the price of one class of tokens at ``at`` (milliseconds since 1970); ``None`` without one."""
        return self.rows(provider, model, at).get(token_class)

    def rows(self, provider: str, model: str, at: int) -> Mapping[TokenClass, Price]:
        """Return the price of each class of tokens that has one at ``at``."""
        changes, spans = self._matching(provider, model)
        return spans[bisect_right(changes, at)]

    def _find(self, provider: str, model: str) -> tuple[list[int], list[dict[TokenClass, Price]]]:
        """Return when a model's prices change, and the prices before, between and after."""
        found = [p for p in self._ranked if glob(p.provider).fullmatch(provider) and glob(p.model).fullmatch(model)]
        changes = sorted({p.valid_from for p in found} | {p.valid_until for p in found if p.valid_until is not None})
        starts = [changes[0] - 1, *changes] if changes else [0]
        return changes, [_chosen([p for p in found if p.valid(start)]) for start in starts]


def _chosen(ranked: Sequence[Price]) -> dict[TokenClass, Price]:
    best: dict[TokenClass, Price] = {}
    for price in ranked:
        best.setdefault(price.token_class, price)
    chosen: dict[TokenClass, Price] = {}
    for token_class in CLASSES:
        own, parent = best.get(token_class), PARENTS.get(token_class)
        inherited = chosen.get(parent) if parent else None
        if inherited is not None and (own is None or inherited.rank > own.rank):
            chosen[token_class] = inherited
        elif own is not None:
            chosen[token_class] = own
    return chosen


@lru_cache(_REMEMBERED)
def glob(pattern: str) -> re.Pattern[str]:
    """Return the expression for a pattern in which ``*`` matches any text and ``?`` for one character."""
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c) or re.escape(c) for c in pattern), re.DOTALL)


def _has_wildcard(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def _literals(pattern: str) -> int:
    return sum(c not in "*?" for c in pattern)
