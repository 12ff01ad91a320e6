"""Test the tail of a feed, its positions, and the start of a replay."""

from hypothesis import given
from hypothesis import strategies as st

from schemas.acceptance import Acceptance, Position, Verdict
from schemas.codec import Header
from services.delivery.formats.tail import GAP, Entry, Positions, Span, Tail, replay_start

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=200)


def filled(sizes: list[int], max_bytes: int, *, floor: int = 0, step: int = 1) -> tuple[Tail, list[Entry]]:
    tail, entries = Tail(floor, max_bytes), []
    for number, size in enumerate(sizes, 1):
        entries.append(Entry(floor + number * step, "g", "delta", b"x" * size))
        tail.append(entries[-1])
    return tail, entries


@given(sizes, st.integers(1, 200))
def test_tail_stays_within_its_bound_and_keeps_the_newest(sizes: list[int], max_bytes: int) -> None:
    tail, entries = filled(sizes, max_bytes)
    assert tail.end == len(entries)
    kept = tail.slice(tail.base, tail.end)
    assert kept == entries[tail.base :]
    assert kept
    assert tail.bytes == sum(len(entry.data) for entry in kept)
    assert tail.bytes <= max_bytes or len(kept) == 1


@given(sizes, st.integers(1, 200), st.integers(0, 50))
def test_all_entries_above_the_floor_are_kept_and_none_below(sizes: list[int], max_bytes: int, floor: int) -> None:
    tail, entries = filled(sizes, max_bytes, floor=floor, step=3)
    assert tail.slice(tail.base, tail.end) == [entry for entry in entries if entry.seq > tail.floor]


@given(sizes, st.integers(1, 200), st.data())
def test_after_returns_exactly_the_entries_behind_a_seq(sizes: list[int], max_bytes: int, data: st.DataObject) -> None:
    tail, entries = filled(sizes, max_bytes, step=2)
    seq = data.draw(st.integers(tail.floor, entries[-1].seq + 3))
    assert tail.slice(tail.after(seq), tail.end) == [entry for entry in entries if entry.seq > seq]


def test_index_of_an_entry_never_changes() -> None:
    tail, entries = filled([10] * 5, 30)
    index = tail.after(entries[3].seq)
    tail.append(Entry(99, "g", "delta", b"x"))
    assert tail.slice(index, index + 1) == [entries[4]]


def test_spans_of_evicted_generations_are_dropped_only_after_they_ended() -> None:
    tail = Tail(0, 50)
    tail.append(Entry(1, "running", "started", b"x" * 10))
    tail.append(Entry(2, "ended", "started", b"x" * 10))
    tail.append(Entry(3, "ended", "completed", b"x" * 10))
    for seq in range(4, 20):
        tail.append(Entry(seq, "latest", "delta", b"x" * 10))
    assert set(tail.spans) == {"running", "latest"}
    assert tail.spans["running"] == Span(1, 1, ended=False)


def test_late_usage_does_not_reopen_a_span() -> None:
    tail = Tail(0, 1_000)
    for seq, type_ in enumerate(("started", "completed", "usage"), 1):
        tail.append(Entry(seq, "g", type_, b"x"))
    assert tail.spans["g"] == Span(1, 3, ended=True)


def test_replay_of_an_empty_tail_has_no_start() -> None:
    assert replay_start({}) is None


def test_replay_begins_with_the_latest_answer() -> None:
    assert replay_start({"a": Span(1, 5, True), "b": Span(6, 9, True)}) == 6


def test_replay_begins_with_the_running_answer_although_a_later_one_has_ended() -> None:
    assert replay_start({"a": Span(1, 5, False), "b": Span(6, 9, True)}) == 1


def test_replay_starts_at_the_first_overlapping_generation() -> None:
    spans = {"a": Span(1, 4, True), "b": Span(3, 8, True), "c": Span(7, 12, True), "d": Span(13, 14, True)}
    assert replay_start({k: spans[k] for k in "abc"}) == 1
    assert replay_start(spans) == 13


spans = st.dictionaries(
    st.text(min_size=1, max_size=3),
    st.tuples(st.integers(1, 60), st.integers(0, 20), st.booleans()).map(lambda t: Span(t[0], t[0] + t[1], t[2])),
    min_size=1,
)


@given(spans)
def test_replay_never_begins_in_the_middle_of_an_answer(spans: dict[str, Span]) -> None:
    start = replay_start(spans)
    assert start is not None
    assert not [s for s in spans.values() if s.first < start <= s.last]
    assert all(s.first >= start for s in spans.values() if not s.ended)
    latest = max(spans.values(), key=lambda s: s.last)
    assert start <= latest.first or any(not s.ended for s in spans.values())


def test_positions_judge_each_generation_by_itself() -> None:
    positions = Positions()
    verdicts = [
        positions.of(g).offer(Header(generation=g, seq=n, type="delta"))
        for g, n in (("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 2), ("b", 1))
    ]
    accepted, duplicate, gap = Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.GAP
    assert verdicts == [accepted, accepted, accepted, duplicate, gap, accepted]


def test_positions_beyond_the_limit_are_dropped_only_for_ended_generations() -> None:
    positions = Positions(limit=10)
    positions.begin("running", Acceptance(Position(1, 5)))
    for number in range(40):
        positions.begin(f"ended{number}", Acceptance(Position(1, 3, ended=True)))
    assert positions.knows("running")
    assert positions.knows("ended39")
    assert sum(positions.knows(f"ended{n}") for n in range(40)) <= 10


def test_a_gap_is_an_entry_directly_before_the_event_that_follows_it() -> None:
    tail = Tail(0, 1_000)
    tail.append(Entry(3, "other", "delta", b"x"))
    tail.append(Entry(9, "g", "delta", b"y", gap="beginning_expired"))
    gap, event = tail.slice(tail.after(3), tail.end)
    assert (gap.type, gap.generation, gap.data, gap.terminal) == (GAP, "g", b"beginning_expired", False)
    assert (event.seq, event.gap) == (9, "")
    assert tail.slice(tail.after(8), tail.end) == [gap, event], "a reader that resumes directly before it is told"
    assert tail.slice(tail.after(9), tail.end) == []
