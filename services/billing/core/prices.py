"""The price book: which price holds for which tokens of which model, and when.

A price is found for each token class by itself: of the rows that match provider and model and are valid at the
generation's start, the most specific one. A provider by its name beats a pattern; then a model by its name beats a
pattern; then the pattern with more literal characters wins; of equal ones the one that became valid last. A class
without a price as specific as that of the class it is part of goes by that one: cached input and cache writes by
``input``, reasoning by ``output``.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Final, Literal, NamedTuple, get_args

import msgspec

__all__ = ["CLASSES", "PARENTS", "PER_REQUEST", "Price", "PriceBook", "PriceKey", "TokenClass", "glob"]

TokenClass = Literal["input", "cached_input", "cache_write", "output", "reasoning", "per_request"]
CLASSES: Final[tuple[TokenClass, ...]] = get_args(TokenClass)
PER_REQUEST: Final = "per_request"
PARENTS: Final[dict[str, TokenClass]] = {"cached_input": "input", "cache_write": "input", "reasoning": "output"}
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
        rows = self._matching(provider, model)
        own = _first_valid(rows.get(token_class, ()), at)
        parent = PARENTS.get(token_class)
        inherited = _first_valid(rows.get(parent, ()), at) if parent else None
        if own is None or (inherited is not None and inherited.rank > own.rank):
            return inherited
        return own

    def _find(self, provider: str, model: str) -> dict[str, list[Price]]:
        found: dict[str, list[Price]] = {}
        for price in self._ranked:
            if glob(price.provider).fullmatch(provider) and glob(price.model).fullmatch(model):
                found.setdefault(price.token_class, []).append(price)
        return found


def _first_valid(rows: Iterable[Price], at: int) -> Price | None:
    return next((p for p in rows if p.valid(at)), None)


@lru_cache(_REMEMBERED)
def glob(pattern: str) -> re.Pattern[str]:
    """Return the expression for a pattern in which ``*`` stands for any text and ``?`` for one character."""
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c) or re.escape(c) for c in pattern), re.DOTALL)


def _has_wildcard(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def _literals(pattern: str) -> int:
    return sum(c not in "*?" for c in pattern)
