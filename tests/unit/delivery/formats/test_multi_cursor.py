"""One cursor for several sessions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.cursor import Cursor, CursorIssuer, InvalidCursor
from services.delivery.formats.granularity import Position
from services.delivery.formats.multi_cursor import MAX_SESSIONS, MultiCursor, parse_multi_cursor

CURSORS = st.lists(
    st.builds(
        lambda partition, name, seq, offset: Cursor(
            partition, f"{partition:02x}" * 4, CursorIssuer(0, "", "t", name).session, seq, offset
        ),
        st.integers(0, 255),
        st.text("abc", min_size=1, max_size=8),
        st.integers(0, 2**47),
        st.integers(0, 2**31),
    ),
    min_size=1,
    max_size=MAX_SESSIONS,
    unique_by=lambda cursor: cursor.session,
)


@given(CURSORS)
def test_multi_cursor_has_every_position(cursors: list[Cursor]) -> None:
    text = MultiCursor(cursors).text().decode()
    assert sorted(parse_multi_cursor(text)) == sorted(cursors)
    assert len(text) < 1_400


@given(CURSORS, st.data())
def test_advance_changes_only_its_own_session(cursors: list[Cursor], data: st.DataObject) -> None:
    composite = MultiCursor(cursors)
    index = data.draw(st.integers(0, len(cursors) - 1))
    composite.advance(index, Position(77, 5))
    wanted = [c._replace(seq=77, offset=5) if n == index else c for n, c in enumerate(cursors)]
    assert sorted(parse_multi_cursor(composite.text().decode())) == sorted(wanted)


def test_cursor_of_one_session_is_a_valid_multi_cursor() -> None:
    issuer = CursorIssuer(3, "now", "t", "s")
    assert parse_multi_cursor(issuer.issue(9)) == [Cursor.parse(issuer.issue(9))]


def test_many_sessions_of_one_log_fit_into_a_header() -> None:
    cursors = [Cursor.parse(CursorIssuer(0, "now", "t", f"s{n}").issue(10_000_000 + n)) for n in range(MAX_SESSIONS)]
    assert len(MultiCursor(cursors).text()) < 500


@given(st.one_of(st.text(), st.text().map("m1".__add__), st.binary().map(lambda b: "m1" + b.hex())))
def test_text_that_is_no_cursor_is_refused(text: str) -> None:
    try:
        found = parse_multi_cursor(text)
    except InvalidCursor:
        return
    assert 0 < len(found) <= MAX_SESSIONS


@pytest.mark.parametrize("text", ["", "m1", "m1AAAA", "m1" + "A" * 3_000, "m1é", "t1"])
def test_malformed_multi_cursors_are_refused(text: str) -> None:
    with pytest.raises(InvalidCursor):
        parse_multi_cursor(text)


@given(st.integers(0, 255), st.integers(0, 2**47), st.integers(0, 2**32 - 1))
def test_cursor_is_read_as_it_was_written(partition: int, seq: int, offset: int) -> None:
    cursor = Cursor(partition, "0123abcd", "89abcdef", seq, offset)
    assert Cursor.parse(cursor.text) == cursor
