"""The terms of settlement in a running service: its settings, and the price book in the database."""

from services.billing.adapters.prices import Prices
from services.billing.core.charging import Charging
from services.billing.core.reconciliation import Policy
from services.billing.core.settlement import Terms

__all__ = ["CurrentTerms"]


class CurrentTerms:
    """Terms shared by all partitions of a process; ``now`` is valid until `refresh` finds a newer price book."""

    def __init__(self, prices: Prices, policy: Policy | None = None, charging: Charging | None = None) -> None:
        self._prices = prices
        self.now = Terms(policy=policy or Policy(), charging=charging or Charging())

    async def refresh(self) -> Terms:
        """Read the price book again if it has changed.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        book = await self._prices.book(self.now.book)
        if book is not self.now.book:
            self.now = Terms(policy=self.now.policy, charging=self.now.charging, book=book)
        return self.now
