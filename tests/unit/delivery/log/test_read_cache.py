"""Test shared reads: every reader receives the events of the log, with one broker request for overlapping reads."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING, Acceptance, Position
from schemas.codec import Header
from services.delivery.log.read_cache import POSITIONS, LogKey, ReadCache
from services.kit.jetstream.broker import Broker, ReadFailed, Stored

KEY = LogKey("S", "then", "log.>")


class Log:
    """A broker that holds messages at some stream sequences, and gives ``batch`` of them at once."""

    def __init__(self, seqs: list[int], batch: int = 10, size: int = 10) -> None:
        self.stored = [Stored(seq, "s", b"x" * size) for seq in seqs]
        self.asked: list[tuple[int, int]] = []
        self.fails = False
        self._batch = batch

    async def read(self, stream: str, filter_: str, from_seq: int = 1, *, up_to: int) -> AsyncIterator[list[Stored]]:
        self.asked.append((from_seq, up_to))
        await asyncio.sleep(0)
        if self.fails:
            raise ReadFailed("away")
        wanted = [stored for stored in self.stored if from_seq <= stored.seq <= up_to]
        for start in range(0, len(wanted), self._batch):
            yield wanted[start : start + self._batch]


def shared(log: Log, **bounds: Any) -> ReadCache:
    return ReadCache(cast("Broker", log), **bounds)


async def read(reads: ReadCache, from_seq: int, up_to: int, key: LogKey = KEY) -> list[int]:
    batches = [batch async for batch in reads.read(key, from_seq, up_to)]
    assert all(batches)
    return [stored.seq for batch in batches for stored in batch]


@given(
    seqs=st.sets(st.integers(1, 3_000), max_size=120),
    spans=st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 3_000)), min_size=1, max_size=12),
    batch=st.integers(1, 40),
    max_bytes=st.sampled_from([1, 2_000, 1_000_000]),
    together=st.booleans(),
)
def test_every_reader_receives_the_stored_messages_once_and_in_order(
    seqs: set[int], spans: list[tuple[int, int]], batch: int, max_bytes: int, together: bool
) -> None:
    stored = sorted(seqs)

    async def run() -> None:
        reads = shared(Log(stored, batch), max_bytes=max_bytes)
        readers = [read(reads, *span) for span in spans]
        got = await asyncio.gather(*readers) if together else [await reader for reader in readers]
        assert got == [[seq for seq in stored if max(1, start) <= seq <= stop] for start, stop in spans]
        assert reads._bytes <= max_bytes
        assert reads._bytes == sum(segment.size for log in reads._logs.values() for segment in log.segments)

    asyncio.run(run())


async def test_many_readers_at_different_positions_cause_few_reads() -> None:
    log = Log(list(range(1, 10_001)), batch=1_000)
    reads = shared(log)
    starts = range(1, 10_001, 7)
    got = await asyncio.gather(*(read(reads, start, 10_000) for start in starts))
    assert all(seqs == list(range(start, 10_001)) for seqs, start in zip(got, starts, strict=True))
    assert len(log.asked) <= 30


async def test_a_single_reader_reads_only_its_own_range() -> None:
    log = Log(list(range(1, 2_001)), batch=1_000)
    assert await read(shared(log), 700, 720) == list(range(700, 721))
    assert log.asked == [(700, 720)]


async def test_a_failed_read_fails_for_all_its_waiters_and_the_next_read_retries() -> None:
    log = Log([1, 2, 3])
    log.fails = True
    reads = shared(log)
    results = await asyncio.gather(*(read(reads, 1, 3) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(result, ReadFailed) for result in results)
    assert len(log.asked) == 1
    log.fails = False
    assert await read(reads, 1, 3) == [1, 2, 3]


async def test_a_cancelled_reader_does_not_affect_the_others() -> None:
    log = Log([1, 2, 3])
    reads = shared(log)
    leaving, staying = (asyncio.create_task(read(reads, 1, 3)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == [1, 2, 3]
    assert len(log.asked) == 1


async def test_a_recreated_log_is_read_again() -> None:
    log = Log([1, 2])
    reads = shared(log)
    await read(reads, 1, 2)
    await read(reads, 1, 2, KEY._replace(incarnation="now"))
    assert len(log.asked) == 2


async def test_unused_segments_are_evicted() -> None:
    log = Log([1, 2])
    reads = shared(log, keep=0.0)
    await read(reads, 1, 2)
    while asyncio.get_running_loop().time() <= reads._logs[KEY].used_at:
        await asyncio.sleep(0)
    reads.sweep()
    assert (len(reads._logs), reads._bytes) == (0, 0)


async def test_position_lookup_uses_the_nearest_earlier_entry_and_the_entries_are_bounded() -> None:

    def known(seq: int) -> tuple[int, Position]:
        at, acceptance = reads.position(KEY, seq)
        assert acceptance.through == at - 1
        return at, acceptance.position

    reads = shared(Log([]))
    assert known(50) == (1, BEGINNING)
    for seq in (10, 30, 20, 30):
        reads.note(KEY, seq, Acceptance(Position(1, seq)))
    assert known(9) == (1, BEGINNING)
    assert known(29) == (20, Position(1, 20))
    assert known(30) == (30, Position(1, 30))
    for seq in range(100, 100 + 2 * POSITIONS):
        reads.note(KEY, seq, Acceptance(Position(1, seq)))
    assert len(reads._logs[KEY].positions) <= POSITIONS


async def test_a_stored_position_is_a_copy() -> None:
    reads, acceptance = shared(Log([])), Acceptance()
    reads.note(KEY, 10, acceptance)
    acceptance.offer(Header("g", 0, "started"), 10)
    _, found = reads.position(KEY, 10)
    found.offer(Header("g", 0, "started"), 10)
    assert reads.position(KEY, 10)[1].position == BEGINNING


@pytest.mark.parametrize("span", [(5, 4), (1, 0), (0, -1)])
async def test_an_empty_range_causes_no_read(span: tuple[int, int]) -> None:
    log = Log([1, 2, 3])
    assert await read(shared(log), *span) == []
    assert not log.asked
