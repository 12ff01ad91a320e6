"""Test the start position of a subscriber, and refused cursors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.cursor import Cursor, CursorIssuer
from services.delivery.errors import CursorExpired, CursorForeign
from services.delivery.fanout.start_position import StartPosition, check_cursor, parse_start

ISSUER = CursorIssuer(0, "2026-01-01T00:00:00Z", "default", "s")


def test_without_anything_reading_begins_at_the_latest_answer() -> None:
    assert parse_start(None, None, None) == (None, StartPosition(where="latest"))


def test_header_wins_over_the_query() -> None:
    assert parse_start("query", "header", None)[0] == "header"
    assert parse_start("query", None, None)[0] == "query"
    assert parse_start("query", "", None)[0] == "query"


@pytest.mark.parametrize("where", ["start", "live"])
def test_start_can_be_chosen(where: str) -> None:
    assert parse_start(None, None, where)[1].where == where


@pytest.mark.parametrize("where", ["", "latest", "LIVE", "x" * 500])
def test_other_starts_are_refused_in_few_words(where: str) -> None:
    with pytest.raises(ValueError, match="start, live") as caught:
        parse_start(None, None, where)
    assert len(str(caught.value)) < 120


@given(st.integers(1, 1_000), st.integers(0, 1_000), st.integers(0, 3_000))
def test_cursor_is_valid_while_all_later_events_are_kept(first: int, length: int, seq: int) -> None:
    last = first + length - 1
    kept = seq == 0 or first - 1 <= seq <= last
    if kept:
        assert check_cursor(ISSUER.issue(seq), ISSUER, first, max(last, seq)) == Cursor.parse(ISSUER.issue(seq))
    else:
        with pytest.raises(CursorExpired):
            check_cursor(ISSUER.issue(seq), ISSUER, first, last)


@given(st.text(max_size=200))
def test_an_invalid_cursor_is_foreign(text: str) -> None:
    with pytest.raises(CursorForeign) as caught:
        check_cursor(text, ISSUER, 1, 10)
    assert len(str(caught.value)) < 400


def test_cursor_of_another_session_or_tenant_is_foreign() -> None:
    created = "2026-01-01T00:00:00Z"
    for other in (
        CursorIssuer(0, created, "default", "t"),
        CursorIssuer(0, created, "other", "s"),
    ):
        with pytest.raises(CursorForeign):
            check_cursor(other.issue(5), ISSUER, 1, 10)


def test_cursor_of_an_earlier_log_has_expired_even_before_its_first_event() -> None:
    earlier = CursorIssuer(0, "2025-01-01T00:00:00Z", "default", "s")
    for seq in (0, 5):
        with pytest.raises(CursorExpired):
            check_cursor(earlier.issue(seq), ISSUER, 1, 10)


def test_cursor_beyond_the_end_of_the_log_has_expired() -> None:
    with pytest.raises(CursorExpired):
        check_cursor(ISSUER.issue(11), ISSUER, 1, 10)


def test_cursor_of_a_session_that_has_moved_to_another_partition_has_expired() -> None:
    with pytest.raises(CursorExpired):
        check_cursor(CursorIssuer(1, "2026-01-01T00:00:00Z", "default", "s").issue(5), ISSUER, 1, 10)
