"""Settlement: reconciliation, drift reasons and charge in one repeatable step."""

from typing import Final

import msgspec

from services.billing.core.calls import last_call
from services.billing.core.charging import Charging, Entry, charge
from services.billing.core.drift import explain
from services.billing.core.generation import Generation
from services.billing.core.prices import PriceBook
from services.billing.core.reconciliation import Policy, reconcile

__all__ = ["Terms", "settle"]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The terms of settlement: tolerances and grace, charging policy, and prices."""

    policy: Policy = Policy()
    charging: Charging = Charging()
    book: PriceBook = PriceBook()


def settle(g: Generation, now: int, terms: Terms) -> tuple[Generation, list[Entry]]:
    """Return ``g`` settled as of ``now`` (milliseconds since 1970), and the new ledger entries.

    Settling again by the same terms changes nothing and adds no entry. Counted and reported are compared for the last
    call; abandoned calls are partial, and each is compared where it is shown.
    """
    reconciled = reconcile(last_call(g), now, terms.policy)
    if reconciled.status not in ("running", "awaiting_provider") or reconciled.reasons:
        reconciled = msgspec.structs.replace(reconciled, reasons=explain(reconciled, terms.policy))
    if g.calls:
        decided = {name: getattr(reconciled, name) for name in _DECIDED}
        reconciled = msgspec.structs.replace(g, **decided)
    return charge(reconciled, now, terms.charging, terms.book)


_DECIDED: Final = ("status", "drift_input", "drift_output", "settle_at", "reasons")
