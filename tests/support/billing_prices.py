"""Prices for billing's tests."""

from decimal import Decimal

from services.billing.core.prices import Price, PriceBook, TokenClass

SINCE = 1_600_000_000_000
BOOK_TOML = """
currency = "USD"

[[price]]
provider = "openai"
model = "gpt*"
from = 2020-09-13
input = "2.50"
cached_input = "1.25"
output = 10
"""


def price(token_class: TokenClass = "input", amount: str = "2.50", **changes: object) -> Price:
    row: dict[str, object] = {"provider": "openai", "model": "gpt*", "currency": "USD", "valid_from": SINCE}
    return Price(**{**row, "token_class": token_class, "amount": Decimal(amount), **changes})  # type: ignore[arg-type]


def rows(**amounts: str) -> list[Price]:
    """Return a row for each class of tokens, by its amount."""
    return [price(name, amount, id=at) for at, (name, amount) in enumerate(amounts.items(), 1)]  # type: ignore[arg-type]


def book(revision: int = 1, **amounts: str) -> PriceBook:
    return PriceBook(revision, rows(**(amounts or {"input": "2.50", "output": "10"})))
