"""Messages between delivery and billing that reserve and release budget for a generation."""

from typing import Final

import msgspec

from schemas.events import VERSION
from schemas.usage import Number

__all__ = ["RELEASE_SUBJECT", "RESERVE_SUBJECT", "Decision", "Release", "Reserve", "budgets_key"]

RESERVE_SUBJECT: Final = "budgets.reserve"
"""Core subject on which billing answers a `Reserve` with a `Decision`."""

RELEASE_SUBJECT: Final = "budgets.release"
"""Core subject on which billing receives a `Release` and answers with an empty message."""


def budgets_key(tenant: str) -> str:
    """Return the key of the registry bucket that exists while a tenant has budgets."""
    return f"budgets.{tenant}"


class Reserve(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reservation for a new generation, with the most that it may use, in tokens.

    ``key`` names the credential. ``models``: the candidates, as ``provider/model``. ``at``: seconds since 1970.
    """

    tenant: str
    session: str
    generation: str
    key: str = ""
    models: list[str] = []
    input: Number = 0
    output: Number = 0
    at: float = 0.0
    v: int = VERSION


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer to a `Reserve`: whether the generation may begin, and was reserved.

    ``budget``: the budget that refuses, or whose soft limit is passed. ``until``: end of that budget's period, in
    seconds since 1970.
    """

    admitted: bool
    budget: str = ""
    detail: str = ""
    until: float | None = None
    v: int = VERSION


class Release(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Release of a reservation: the generation was admitted but could not be queued."""

    tenant: str
    session: str
    generation: str
    v: int = VERSION
