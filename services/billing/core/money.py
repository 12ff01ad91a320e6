"""Exact money: decimal amounts with twelve places; no arithmetic here rounds.

A price has at most six places per 1,000,000 tokens, so an amount for any number of tokens has at most twelve.
"""

import re
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Final

__all__ = ["LARGEST", "PLACES", "ZERO", "AmountTooLarge", "parse_price", "render", "times"]

PLACES: Final = 12
LARGEST: Final = Decimal(9_000_000)
"""Exclusive bound of a single amount: in units of 10⁻¹² it fits a signed 64-bit integer, as SQLite stores it."""
ZERO: Final = Decimal(0)
_PRICE_PLACES: Final = 6
_MILLION: Final = 6  # as a power of ten
_EXACT: Final = Context(prec=60, traps=[Inexact, InvalidOperation])
_PLAIN: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,20})?")


class AmountTooLarge(ValueError):
    """An amount beyond what one generation can plausibly cost."""

    def __init__(self, amount: Decimal) -> None:
        self.amount = amount
        super().__init__(f"an amount of {amount:f} is beyond what one generation may cost ({LARGEST:f})")


def parse_price(text: str) -> Decimal:
    """Parse a price, written as a plain decimal number.

    Raises:
        ValueError: it is not a number, is negative or too large, or has more than six places.
    """
    if _PLAIN.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not a plain decimal number such as 2.50")
    price = Decimal(text).normalize(_EXACT)
    if -int(price.as_tuple().exponent) > _PRICE_PLACES:
        raise ValueError(f"{text[:40]} has more than {_PRICE_PLACES} decimal places")
    if price >= LARGEST:
        raise ValueError(f"{text[:40]} is not below {LARGEST:f}")
    return price


def times(count: int, price: Decimal, *, per_million: bool = True) -> Decimal:
    """Return the exact amount for ``count`` tokens (or requests) at ``price``.

    Raises:
        AmountTooLarge: it is not below `LARGEST`.
    """
    amount = _EXACT.multiply(Decimal(count), price)
    amount = _EXACT.scaleb(amount, -_MILLION) if per_million else amount
    if amount >= LARGEST:
        raise AmountTooLarge(amount)
    return amount


def render(amount: Decimal) -> str:
    """Format an amount as plain text without trailing zeros."""
    text = f"{amount:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"
