"""Count events sent of each generation, periodically from subscribers' positions, without work per token."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from schemas.codec import MalformedEvent, decode_header
from services.delivery.formats.tail import GAP, Entry, Tail
from services.delivery.reports.reporter import DeliveryReporter, GenerationKey

__all__ = ["Counted", "DeliveryCounts"]


class Counted(Protocol):
    """Port of a subscriber to count: served up to ``seq``, counted up to ``accounted``."""

    accounted: int

    @property
    def seq(self) -> int:
        """The stream sequence up to which it was served."""

    @property
    def generation(self) -> str | None:
        """The generation that it reads; ``None`` for the whole session."""

    def meets(self, generation: str) -> bool:
        """Return whether this is the first count for the generation."""


class _Sum(NamedTuple):
    """Totals of one generation in a log range. ``base``, ``reached``: its running token count before and after."""

    generation: str
    events: int
    size: int
    base: int
    reached: int


class DeliveryCounts:
    """Count for billing the events sent to the subscribers of one process."""

    def __init__(self, delivered: DeliveryReporter) -> None:
        self._delivered = delivered

    def count(self, tenant: str, session: str, tail: Tail, subscribers: Iterable[Counted]) -> None:
        """Count events sent from memory since the last count, once for all subscribers with the same range."""
        stretches: dict[tuple[int, int, str | None], list[_Sum]] = {}
        alike: dict[tuple[int, int, str | None], int] = {}
        firsts: dict[tuple[tuple[int, int, str | None], str], int] = {}
        for subscriber in subscribers:
            if subscriber.seq <= subscriber.accounted:
                continue
            key = (subscriber.accounted, subscriber.seq, subscriber.generation)
            subscriber.accounted = subscriber.seq
            sums = stretches.get(key)
            if sums is None:
                first = max(tail.after(max(key[0], tail.floor)), tail.base)
                sums = stretches[key] = _sums(tail.slice(first, tail.after(key[1])), key[2])
            alike[key] = alike.get(key, 0) + 1
            for each in sums:
                if subscriber.meets(each.generation):
                    firsts[key, each.generation] = firsts.get((key, each.generation), 0) + 1
        for key, count in alike.items():
            for each in stretches[key]:
                self._add(tenant, session, each, count, firsts.get((key, each.generation), 0))

    def count_replayed(self, tenant: str, session: str, subscriber: Counted, entries: Sequence[Entry]) -> None:
        """Count the events sent to one subscriber from the log."""
        for each in _sums(entries, subscriber.generation):
            self._add(tenant, session, each, 1, int(subscriber.meets(each.generation)))

    def _add(self, tenant: str, session: str, each: _Sum, count: int, firsts: int) -> None:
        self._delivered.add(
            GenerationKey(tenant, session, each.generation),
            events=each.events * count,
            tokens=max(0, each.reached - each.base) * count,
            reached=each.reached,
            size=each.size * count,
            subscribers=firsts,
        )


def _sums(entries: Iterable[Entry], generation: str | None) -> list[_Sum]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.type != GAP and (generation is None or entry.generation == generation):
            found.setdefault(entry.generation, []).append(entry)
    return [_sum(name, of) for name, of in found.items()]


def _sum(generation: str, entries: Sequence[Entry]) -> _Sum:
    deltas = [entry for entry in entries if entry.type == "delta"]
    whole = entries[0].type in ("started", "restarted")
    base = 0 if whole or not deltas else _tokens(deltas[0])
    size = sum(len(entry.data) for entry in entries)
    return _Sum(generation, len(entries), size, base, _tokens(deltas[-1]) if deltas else 0)


def _tokens(entry: Entry) -> int:
    try:
        return decode_header(entry.data).tokens or 0
    except MalformedEvent:
        return 0
