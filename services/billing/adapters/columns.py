"""Column types that mean the same on both databases."""

from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, Numeric
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from services.billing.core.money import PLACES

__all__ = ["MoneyType"]


class MoneyType(TypeDecorator[Decimal]):
    """An exact amount with twelve places: ``NUMERIC`` on PostgreSQL; on SQLite, which has none, a number of 10⁻¹².

    Sums are exact on both; one that SQLite cannot hold (9.2 million) is an error there and never a wrong number.
    """

    impl = Numeric(30, PLACES)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type that the database has for it."""
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else Numeric(30, PLACES))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Return what the driver takes."""
        return value if value is None or dialect.name != "sqlite" else int(value.scaleb(PLACES))

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Return the amount."""
        return value if value is None or dialect.name != "sqlite" else Decimal(value).scaleb(-PLACES)
