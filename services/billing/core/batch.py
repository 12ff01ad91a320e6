"""Fold and settle a batch of records of many generations, and sort the results by the kind of write they need."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from schemas.subjects import Address, InvalidSubject, parse_address
from services.billing.core.charging import Entry
from services.billing.core.fold import fold
from services.billing.core.generation import Generation, Key
from services.billing.core.intake import Record
from services.billing.core.settlement import Terms, settle

__all__ = ["Batch", "Group", "fold_batch", "group"]


class Group(msgspec.Struct):
    """The records of one generation, in log order."""

    address: Address
    records: list[Record]

    @property
    def key(self) -> Key:
        """Return the generation's key."""
        return Key(self.address.tenant, self.address.session, self.address.generation)


class Batch(msgspec.Struct):
    """The writes of a batch: whole rows, rows with a new position and running count only, new ledger entries, and the
    number of events by verdict.
    """

    whole: list[Generation] = []
    progress: list[Generation] = []
    entries: list[Entry] = []
    verdicts: Counter[str] = msgspec.field(default_factory=Counter)


def group(records: Iterable[Record]) -> tuple[list[Group], int]:
    """Group records by generation; also return the number of records whose subject names no generation."""
    groups: dict[str, Group | None] = {}
    strays = 0
    for record in records:
        subject = record.subject
        if subject in groups:
            found = groups[subject]
        else:
            found = groups[subject] = _found(subject)
        if found is None:
            strays += 1
        else:
            found.records.append(record)
    return [g for g in groups.values() if g is not None], strays


def _found(subject: str) -> Group | None:
    try:
        return Group(parse_address(subject), [])
    except InvalidSubject:
        return None


def fold_batch(
    groups: Iterable[Group],
    known: Mapping[Key, Generation],
    now: int,
    terms: Terms,
    lost: int = 0,
    highest: Mapping[Key, int] = MappingProxyType({}),
) -> Batch:
    """Fold ``groups`` into the ``known`` generations and settle those that changed. ``now`` in milliseconds since 1970.

    ``lost``: the last stream sequence that expired unread. ``highest``: the highest epoch in the log of each generation
    that is joined behind expired events.
    """
    batch = Batch()
    for one in groups:
        folded = fold(known.get(one.key), one.address, one.records, lost, highest.get(one.key, 0))
        batch.verdicts.update(folded.verdicts)
        if folded.generation is None:
            continue
        if folded.change == "progress":
            batch.progress.append(folded.generation)
        elif folded.change == "whole":
            settled, entries = settle(folded.generation, now, terms)
            batch.whole.append(settled)
            batch.entries += entries
    return batch
