"""Query parameters and cursors of the usage API."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.core.question import (
    BadQuestion,
    parse_group_by,
    parse_moment,
    parse_page,
    parse_status,
    render_bucket,
    write_page,
)
from services.billing.database_url import database_url


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-02", 86_400_000),
        ("1970-01-02T00:00:00Z", 86_400_000),
        ("1970-01-02T01:00:00.250+01:00", 86_400_250),
        ("1970-01-02T01:00:00 01:00", 86_400_000),
        (None, None),
    ],
)
def test_moments_are_dates_or_rfc_3339(text: str | None, moment: int | None) -> None:
    assert parse_moment("from", text) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-01-31T12:00:00", "1e9", "2026-01-31T25:00:00Z"])
def test_other_moments_are_refused_by_name(text: str) -> None:
    with pytest.raises(BadQuestion, match=r"^from: "):
        parse_moment("from", text)


def test_dimensions_are_separated_by_commas_or_repeated() -> None:
    assert parse_group_by(["model,day", "session"]) == ("model", "day", "session")
    assert parse_group_by(None) == ()


@pytest.mark.parametrize("values", [["colour"], ["day", "day"], ["day,day"]])
def test_unknown_and_doubled_dimensions_are_refused(values: list[str]) -> None:
    with pytest.raises(BadQuestion, match=r"^group_by"):
        parse_group_by(values)


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(BadQuestion, match="matched"):
        parse_status("settled")


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(0, 2**40))
def test_a_page_cursor_round_trips(text: str, number: int) -> None:
    cursor = write_page("question", (text, number))
    assert parse_page("question", cursor, (str, int)) == (text, number)
    with pytest.raises(BadQuestion, match="another query"):
        parse_page("other", cursor, (str, int))
    with pytest.raises(BadQuestion):
        parse_page("question", cursor, (int, str))


@given(st.text(max_size=60))
def test_any_other_text_is_no_cursor(text: str) -> None:
    with pytest.raises(BadQuestion, match=r"^cursor"):
        parse_page("question", text, (str,))


def test_buckets_read_as_days_and_hours() -> None:
    assert render_bucket("day", 20_484) == "2026-01-31"
    assert render_bucket("hour", 20_484 * 24 + 12) == "2026-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("given_url", "driver"),
    [
        ("sqlite:///a/b.db", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:///b.db", "sqlite+aiosqlite"),
        ("postgresql://u:p@h/d", "postgresql+asyncpg"),
        ("postgres://u@h/d", "postgresql+asyncpg"),
    ],
)
def test_database_urls_get_their_asynchronous_driver(given_url: str, driver: str) -> None:
    assert database_url(given_url).drivername == driver


@pytest.mark.parametrize("text", ["mysql://h/d", "nonsense", ""])
def test_other_databases_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="sqlite"):
        database_url(text)
