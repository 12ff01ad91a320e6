"""What can go wrong in billing, grouped by what the caller must do."""

from services.kit.endings import CannotRun

__all__ = ["BillingError", "Fenced", "LedgerUnavailable", "LedgerUnusable", "StalePrices"]


class BillingError(Exception):
    """Any error of billing's own."""


class LedgerUnavailable(BillingError):
    """The database cannot be reached or refused for now: try the same again later. Nothing is known to be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the database does not answer: {reason}")


class LedgerUnusable(BillingError, CannotRun):
    """The database is damaged, not one of billing's, of a newer version, or cannot be written: a person must act."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"the billing database cannot be used: {reason}; {remedy}")


class Fenced(BillingError):
    """Another process has taken the partition or moved its position: forget all and begin from its row."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        super().__init__(f"partition {partition} has been taken over or moved on")


class StalePrices(BillingError):
    """The price book has changed since a batch was reckoned: read it again and reckon the batch anew."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        super().__init__(f"revision {revision} of the price book is no longer the present one")
