"""Test the partition of a session's events over changes of the number of partitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.partitions import HistoryUnreadable, candidates, decode_history, encode_history, extended, settled
from schemas.subjects import partition_of

COUNTS = st.lists(st.integers(1, 256), min_size=1, max_size=6)
SESSIONS = st.text("abcdefgh0123", min_size=1, max_size=8)


@given(COUNTS, SESSIONS)
def test_without_stored_events_the_newest_count_decides(history: list[int], session: str) -> None:
    assert settled(candidates("t", session, history), ()) == partition_of("t", session, history[-1])


@given(COUNTS, SESSIONS, st.integers(1, 256))
def test_a_change_leaves_a_session_where_its_events_are(history: list[int], session: str, count: int) -> None:
    before = settled(candidates("t", session, history), ())
    after = candidates("t", session, extended(history, count))
    assert before in after
    assert settled(after, {before}) == before
    assert settled(after, ()) == partition_of("t", session, count)


@given(COUNTS, SESSIONS)
def test_candidates_are_distinct(history: list[int], session: str) -> None:
    options = candidates("t", session, history)
    assert len(set(options)) == len(options)


def test_the_oldest_partition_with_events_wins() -> None:
    assert settled((3, 1, 0), {1, 0}) == 0
    assert settled((3, 1, 0), {3, 1}) == 1


@given(COUNTS, st.integers(1, 256))
def test_a_partition_count_is_in_the_history_once_and_the_newest_is_last(history: list[int], count: int) -> None:
    grown = extended(extended((), history[0]), count)
    assert grown[-1] == count
    assert len(set(grown)) == len(grown)
    assert decode_history(encode_history(grown)) == grown


@pytest.mark.parametrize("data", [b"", b"[]", b"[0]", b"[257]", b'["1"]', b"7", b"{}"])
def test_an_unreadable_history_is_refused(data: bytes) -> None:
    with pytest.raises(HistoryUnreadable):
        decode_history(data)
