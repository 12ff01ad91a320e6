"""Rebuilding from the log: everything that it still keeps is folded anew, and what differs is set right.

The ledger stays: where the numbers come out otherwise, the difference is a correction. Generations older than the log
are left as they are. Other processes wait meanwhile, because the partition is held; after a crash in the middle the
running service goes on from there.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from services.billing.adapters.balances import Balance, Balances
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.tail import Tail
from services.billing.adapters.worklist import Money
from services.billing.core.batch import Group, fold_batch, group
from services.billing.core.calls import forget_events
from services.billing.core.fold import joins_late
from services.billing.core.generation import DELIVERED, Generation, Key
from services.billing.core.intake import Record
from services.billing.core.spending import released, steps
from services.billing.errors import BillingError, StalePrices
from services.billing.terms import CurrentTerms
from services.kit.clock import Clock

__all__ = ["Held", "Rebuild", "Rebuilt"]

NAMED: Final = 1_000
"""Bound of generations named in a report."""
_TOLD: Final = ("calls", "usage", "usage_source", "reported_at")
"""Columns of which exports may have told something, which is not in the log."""


class Held(BillingError):
    """A running process holds the partition: stop billing first."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        super().__init__(f"partition {partition} is held by a running process: stop billing, then rebuild")


class Rebuilt(msgspec.Struct, kw_only=True):
    """What a rebuild of one partition found. ``first`` and ``last`` bound what the log keeps, as stream sequences.

    ``missing_before``: the log has lost what came before ``first``, so generations of that time were left as they were.
    ``changed`` generations had other numbers than the log tells, the first of them by name; ``entries``: corrections.
    """

    partition: int
    first: int
    last: int
    missing_before: bool
    events: int = 0
    generations: int = 0
    changed: int = 0
    entries: int = 0
    names: list[str] = []


class Rebuild:
    """Folds one partition's log anew, into the database that ``ledger`` writes to."""

    def __init__(self, partition: int, tail: Tail, ledger: Ledger, terms: CurrentTerms, clock: Clock) -> None:
        self._partition = partition
        self._tail = tail
        self._ledger = ledger
        self._balances = Balances(ledger.engine)
        self._terms = terms
        self._clock = clock
        self._running: dict[Key, Generation] = {}
        self._numbers: dict[Key, tuple[int, int]] = {}  # of each generation of the log: before, and now

    async def run(self) -> Rebuilt:
        """Fold all that the log keeps by now; afterwards the partition's position is its end.

        Raises:
            Held: another process has the partition.
            BrokerUnavailable: the broker did not answer.
            LedgerUnavailable: the database did not answer. It can be begun again.
        """
        state = await self._tail.verify()
        applied = await self._ledger.acquire(
            self._partition, state.incarnation, self._now(), base=state.base, lost=state.lost
        )
        if applied is None:
            raise Held(self._partition)
        found = Rebuilt(
            partition=self._partition, first=state.first_seq, last=state.last_seq, missing_before=state.first_seq > 1
        )
        try:
            await self._terms.refresh()
            await self._ledger.commit(self._partition, (applied, 0), self._now())
            position = 0
            async for records in self._tail.between(max(1, state.first_seq), state.last_seq):
                await self._apply(records, position, found, max(0, state.first_seq - 1))
                position = records[-1].seq
            await self._ledger.commit(self._partition, (position, max(position, state.last_seq)), self._now())
        finally:
            await self._ledger.release(self._partition)
        changed = [key for key, (before, after) in self._numbers.items() if before != after]
        found.generations, found.changed = len(self._numbers), len(changed)
        found.names = [key.generation for key in changed[:NAMED]]
        return found

    async def _apply(self, records: Sequence[Record], position: int, found: Rebuilt, lost: int) -> None:
        groups, _strays = group(records)
        before, known = await self._known(groups)
        now = self._now()
        late = [one for one in groups if joins_late(known.get(one.key), one.records, lost)]
        highest = await self._tail.highest_epochs(late)
        while True:
            terms = self._terms.now
            batch = fold_batch(groups, known, now, terms, lost, highest)
            money = Money(
                revision=terms.book.revision,
                entries=batch.entries,
                spending=steps(before, batch.whole),
                released=released(before, batch.whole),
            )
            # What moved only on is written whole too: the row may be lost, or another one.
            written = [*batch.whole, *batch.progress]
            try:
                moved = (position, records[-1].seq)
                await self._ledger.commit(self._partition, moved, now, written, (), money, stamp=records[-1].stamp)
                break
            except StalePrices:
                await self._terms.refresh()
        found.events += len(records)
        found.entries += len(batch.entries)
        for g in written:
            self._numbers[g.key] = (self._numbers[g.key][0], _numbers(g))
            if g.ended:
                self._running.pop(g.key, None)
            else:
                self._running[g.key] = g

    async def _known(self, groups: Sequence[Group]) -> tuple[dict[Key, Generation], dict[Key, Generation]]:
        """Return generations as the database has them, and what their events are folded onto.

        That is what this rebuild has made of them, or where they are new to it nothing but their money.
        """
        again = [one.key for one in groups if one.key in self._numbers]
        new = [one for one in groups if one.key not in self._numbers]
        known = {key: self._running[key] for key in again if key in self._running}
        known |= await self._ledger.load([key for key in again if key not in known])
        stored = await self._ledger.load([one.key for one in new])
        balances = await self._balances.of([one.key for one in new])
        before = known | stored
        for one in new:
            row = stored.get(one.key)
            self._numbers[one.key] = (0 if row is None else _numbers(row),) * 2
            known[one.key] = _bare(row, balances.get(one.key, Balance()), one)
        return before, known

    def _now(self) -> int:
        return round(self._clock.wall() * 1_000)


def _bare(row: Generation | None, balance: Balance, one: Group) -> Generation:
    """Return a generation as if none of its events were known, with what does not come from the log."""
    money = msgspec.structs.asdict(balance)
    header = one.records[0].header
    if row is not None and (header is None or header.seq > 0):
        # The log has lost its head: what is known of it stays, and its events are repeats.
        return msgspec.structs.replace(row, **money)
    kept: dict[str, Any] = {} if row is None else {name: getattr(row, name) for name in (*_TOLD, "tokens")}
    g = Generation(**one.key._asdict(), partition=one.address.partition, **money, **kept)
    forget_events(g)
    return g


_APART: Final = frozenset({*DELIVERED, "log_seq", "entries", "duplicates", "gaps", "zombies", "late", "settle_at"})


def _numbers(g: Generation) -> int:
    """Return a digest of what a rebuild compares: all but positions, and how often events were repeated."""
    return hash(tuple(getattr(g, name) for name in Generation.__struct_fields__ if name not in _APART))
