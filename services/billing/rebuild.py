"""Rebuild from the log: fold all events it still has again, and correct the differences.

The ledger stays: where the result differs, the difference is a correction. Generations older than the log are
unchanged. Other processes wait meanwhile, because the partition is held; after a crash in the middle the running
service continues from there.
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
_EXPORTED: Final = ("calls", "usage", "usage_source", "reported_at")
"""Columns that an export may have set; their values are not in the log."""


class Held(BillingError):
    """A running process holds the partition: stop billing first."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        super().__init__(f"partition {partition} is held by a running process: stop billing, then rebuild")


class Rebuilt(msgspec.Struct, kw_only=True):
    """The result of rebuilding one partition. ``first`` and ``last`` bound the log, as stream sequences.

    ``missing_before``: the log has lost the events before ``first``, so generations of that time are unchanged.
    ``changed`` generations differed from the log, the first of them by name; ``entries``: corrections.
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
    """Fold one partition's log again, into the database of ``ledger``."""

    def __init__(self, partition: int, tail: Tail, ledger: Ledger, terms: CurrentTerms, clock: Clock) -> None:
        self._partition = partition
        self._tail = tail
        self._ledger = ledger
        self._balances = Balances(ledger.engine)
        self._terms = terms
        self._clock = clock
        self._running: dict[Key, Generation] = {}
        self._numbers: dict[Key, tuple[int, int]] = {}  # digests of each generation in the log: before, and now

    async def run(self) -> Rebuilt:
        """Fold all events now in the log; afterwards the partition's position is its end.

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
            # Rows with mere progress are written whole too: the stored row may be missing or differ.
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
        """Return generations as stored in the database, and the states onto which their events are folded.

        The latter are this rebuild's results so far; for generations new to it, rows with only their money.
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
    """Return a generation with none of its events applied, keeping the fields that do not come from the log."""
    money = msgspec.structs.asdict(balance)
    header = one.records[0].header
    if row is not None and (header is None or header.seq > 0):
        # The log has lost its head: the stored state stays, and its events are repeats.
        return msgspec.structs.replace(row, **money)
    kept: dict[str, Any] = {} if row is None else {name: getattr(row, name) for name in (*_EXPORTED, "tokens")}
    g = Generation(**one.key._asdict(), partition=one.address.partition, **money, **kept)
    forget_events(g)
    return g


_NOT_COMPARED: Final = frozenset(
    {*DELIVERED, "log_seq", "entries", "duplicates", "gaps", "zombies", "late", "settle_at"}
)


def _numbers(g: Generation) -> int:
    """Return a digest of the fields that a rebuild compares: all but positions and counts of dropped events."""
    return hash(tuple(getattr(g, name) for name in Generation.__struct_fields__ if name not in _NOT_COMPARED))
