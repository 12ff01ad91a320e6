"""Billing's errors, grouped by what the caller must do."""

from services.kit.endings import CannotRun

__all__ = ["BillingError", "Fenced", "LedgerUnavailable", "LedgerUnusable", "StalePrices"]


class BillingError(Exception):
    """The base class of billing's errors."""


class LedgerUnavailable(BillingError):
    """The database is unreachable or refused temporarily: retry later. The outcome of a write is unknown."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the database does not answer: {reason}")


class LedgerUnusable(BillingError, CannotRun):
    """The database is damaged, not one of billing's, of a newer version, or cannot be written: a person must act."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"the billing database cannot be used: {reason}; {remedy}")


class Fenced(BillingError):
    """Another process has taken the partition or moved its position: drop the memory and restart from its row."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        super().__init__(f"partition {partition} has been taken over or moved on")


class StalePrices(BillingError):
    """The price book has changed since a batch was priced: read it again and price the batch again."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        super().__init__(f"revision {revision} of the price book is no longer the present one")
