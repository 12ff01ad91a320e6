"""What delivery and billing say to each other about budgets, before a generation may begin."""

from typing import Final

import msgspec

from schemas.events import VERSION
from schemas.usage import Number

__all__ = ["RELEASE_SUBJECT", "RESERVE_SUBJECT", "Decision", "Release", "Reserve", "budgets_key"]

RESERVE_SUBJECT: Final = "budgets.reserve"
"""Core subject on which billing answers a `Reserve` with a `Decision`."""

RELEASE_SUBJECT: Final = "budgets.release"
"""Core subject on which billing hears a `Release`, and answers with an empty message."""


def budgets_key(tenant: str) -> str:
    """Return the key of the registry bucket that exists while a tenant has budgets."""
    return f"budgets.{tenant}"


class Reserve(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A generation that is to begin, and the most that it may use, in tokens.

    ``key`` names the credential. ``models``: who may answer, as ``provider/model``. ``at`` in seconds since 1970.
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
    """Whether it may begin; reserved then. ``budget`` names the one that refuses, or whose soft limit is passed.

    ``until``: when that one's period ends, in seconds since 1970.
    """

    admitted: bool
    budget: str = ""
    detail: str = ""
    until: float | None = None
    v: int = VERSION


class Release(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A generation that was admitted and could not be queued."""

    tenant: str
    session: str
    generation: str
    v: int = VERSION
