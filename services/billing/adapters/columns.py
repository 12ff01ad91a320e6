"""Column types with the same meaning on both databases."""

from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, Numeric
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from services.billing.core.money import PLACES

__all__ = ["MoneyType"]


class MoneyType(TypeDecorator[Decimal]):
    """An exact amount with twelve places: ``NUMERIC`` on PostgreSQL, an integer in units of 10⁻¹² on SQLite.

    Sums are exact on both; a sum beyond SQLite's range (9.2 million) raises an error and is never wrong.
    """

    impl = Numeric(30, PLACES)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the column type of the database."""
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else Numeric(30, PLACES))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Convert an amount to the driver's value."""
        return value if value is None or dialect.name != "sqlite" else int(value.scaleb(PLACES))

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Convert the driver's value to an amount."""
        return value if value is None or dialect.name != "sqlite" else Decimal(value).scaleb(-PLACES)
