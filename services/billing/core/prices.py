"""The price book: find the price of a model's tokens at a given time.

Each token class is priced separately, by the most specific row that matches provider and model and is valid at the
generation's start. A provider by its name precedes a pattern; then a model by its name precedes a pattern; then the
pattern with more literal characters; among equal rows, the one that became valid last. A class without a price as
specific as that of its parent class uses the parent's: cached input and cache writes use ``input``, writes for an hour
``cache_write``, reasoning ``output``.
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
"""The parent of each class; in `CLASSES` a parent precedes its children."""
_REMEMBERED: Final = 10_000
"""Bound of cached provider and model pairs."""


class PriceKey(NamedTuple):
    """The key of a price row: its provider, model, class and start of validity."""

    provider: str
    model: str
    token_class: str
    valid_from: int


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """One dated row. Amount in ``currency`` per 1,000,000 tokens, for ``per_request`` per request.

    ``provider`` and ``model`` may contain ``*`` and ``?``. Valid from ``valid_from`` up to, not including,
    ``valid_until`` (``None``: without end), in milliseconds since 1970. ``id`` is the database's, 0 before the row is
    stored.
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
        """Return its key."""
        return PriceKey(self.provider, self.model, self.token_class, self.valid_from)

    def content(self) -> tuple[object, ...]:
        """Return the fields that make two rows equal."""
        return (*self.key, self.currency, self.amount.normalize(), self.valid_until)

    def valid(self, at: int) -> bool:
        """Return whether the row is valid at ``at``."""
        return self.valid_from <= at and (self.valid_until is None or at < self.valid_until)

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """Return how specific the row is; the larger rank wins."""
        return (
            not _has_wildcard(self.provider),
            not _has_wildcard(self.model),
            _literals(self.model),
            _literals(self.provider),
        )


class PriceBook:
    """The current price rows, under a revision number that grows with every change."""

    def __init__(self, revision: int = 0, prices: Sequence[Price] = ()) -> None:
        self.revision = revision
        self.prices = tuple(prices)
        # Best first, so that the first valid row wins; ties go to the later row, then by text.
        self._ranked = sorted(self.prices, key=lambda p: (p.rank, p.valid_from, p.model, p.provider), reverse=True)
        self._matching = lru_cache(_REMEMBERED)(self._find)

    def price(self, provider: str, model: str, token_class: TokenClass, at: int) -> Price | None:
        """Return the price of a token class at ``at`` (milliseconds since 1970), or None."""
        return self.rows(provider, model, at).get(token_class)

    def rows(self, provider: str, model: str, at: int) -> Mapping[TokenClass, Price]:
        """Return the price of each token class that has one at ``at``."""
        changes, spans = self._matching(provider, model)
        return spans[bisect_right(changes, at)]

    def _find(self, provider: str, model: str) -> tuple[list[int], list[dict[TokenClass, Price]]]:
        """Return the times at which a model's prices change, and the prices before, between and after them."""
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
    """Compile a pattern in which ``*`` matches any text and ``?`` one character."""
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c) or re.escape(c) for c in pattern), re.DOTALL)


def _has_wildcard(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def _literals(pattern: str) -> int:
    return sum(c not in "*?" for c in pattern)
