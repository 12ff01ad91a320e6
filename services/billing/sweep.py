"""Settle generations that wait for something other than events: a grace period, new prices, a provider's export."""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import structlog

from services.billing import metrics
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.worklist import AT_ONCE, Export, Money, Worklist
from services.billing.core.budgets import corrected
from services.billing.core.calls import last_call
from services.billing.core.charging import Entry
from services.billing.core.fold import take_export
from services.billing.core.generation import Generation, Key
from services.billing.core.settlement import settle
from services.billing.core.spending import released, steps
from services.billing.errors import StalePrices
from services.billing.overruns import report_limits, report_overruns
from services.billing.terms import CurrentTerms

__all__ = ["Sweep", "notify"]

log = structlog.get_logger()
ROUNDS: Final = 20
"""Bound of rounds in one sweep while its list is full, before events are read again."""


class Sweep:
    """The queued settlements of one partition, done by the process that holds it."""

    def __init__(self, partition: int, ledger: Ledger, terms: CurrentTerms) -> None:
        self.partition = partition
        self.ledger = ledger
        self.terms = terms
        self.worklist = Worklist(ledger.engine)
        self._budgets = Budgets(ledger.engine)

    async def run(self, applied: int, now: int, lost: int = 0) -> list[Key]:
        """Settle all that is due at ``now`` (milliseconds since 1970); ``applied`` is the partition's position.

        ``lost``: the last stream sequence that expired unread; generations running before it may have ended there.
        Returns the generations that were written.

        Raises:
            Fenced: another process has the partition.
            LedgerUnavailable: the database did not answer.
        """
        written: list[Key] = []
        for _round in range(ROUNDS):
            try:
                more = await self._round(applied, now, lost, written)
            except StalePrices:
                await self.terms.refresh()
            else:
                if not more:
                    break
        return written

    async def _round(self, applied: int, now: int, lost: int, written: list[Key]) -> bool:
        due = await self.worklist.due(self.partition, now)
        resettling = await self.worklist.resettling(self.partition)
        exports = await self.worklist.exports(self.partition)
        if not due and not resettling and not exports:
            return False
        before = {g.key: g for g in (*due, *resettling, *(e.generation for e in exports))}
        waiting = _with_exports(before, exports)
        terms = self.terms.now
        changed: list[Generation] = []
        entries: list[Entry] = []
        for g in waiting.values():
            settled, more = settle(_closed(g, now, lost), now, terms)
            entries += more
            if settled != before[g.key]:
                changed.append(settled)
        money = Money(
            revision=terms.book.revision,
            entries=entries,
            resettled=[g.key for g in resettling],
            exports=[(e.id, "applied") for e in exports],
            spending=steps(before, changed),
            released=released(before, changed),
        )
        over = await self.ledger.commit(self.partition, (applied, applied), now, changed, (), money)
        await report_overruns(self._budgets, over)
        await report_limits(self._budgets, corrected(before, changed))
        written += [g.key for g in changed]
        notify(changed, before, entries)
        return max(len(due), len(resettling), len(exports)) >= AT_ONCE


def _with_exports(before: Mapping[Key, Generation], exports: Iterable[Export]) -> dict[Key, Generation]:
    """Return the generations with the reports of exports applied, the newest last."""
    found = dict(before)
    for export in exports:
        g = msgspec.structs.replace(found[export.generation.key])
        g.reported_at = g.reported_at if export.call else export.created_at
        take_export(g, export.call, export.usage)
        found[g.key] = g
    return found


def _closed(g: Generation, now: int, lost: int) -> Generation:
    """Return a generation without events since the log lost some as an interrupted one."""
    if g.ended or g.settle_at is None or g.settle_at > now or g.log_seq > lost:
        return g
    return msgspec.structs.replace(g, state="interrupted", code="log_expired", ended_at=g.started_at)


def notify(generations: Iterable[Generation], before: Mapping[Key, Generation], entries: Iterable[Entry] = ()) -> None:
    """Count changes of status and money, and log the outcome of each settlement."""
    for entry in entries:
        metrics.ENTRIES.labels(entry.kind, entry.currency).inc()
        metrics.CHARGED.labels(entry.currency).inc(max(0.0, float(entry.amount)))
        metrics.CREDITED.labels(entry.currency).inc(max(0.0, -float(entry.amount)))
    for g in generations:
        old = before.get(g.key)
        if g.headless and old is None:
            metrics.HEADLESS.inc()
        if g.pricing == "unpriced" and (old is None or old.pricing != "unpriced"):
            metrics.UNPRICED.inc()
        if old is not None and old.status == g.status:
            continue
        metrics.SETTLED.labels(g.status).inc()
        if g.status in ("matched", "drift") and (reported := last_call(g).output) is not None:
            metrics.DRIFT.observe(abs(g.drift_output or 0) / max(1, reported))
        if g.ended:
            log.debug("settled", session=g.session, generation=g.generation, status=g.status, state=g.state)
