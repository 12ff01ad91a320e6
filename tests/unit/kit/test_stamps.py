"""Times as the broker writes them."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.stamps import nanoseconds


@given(st.integers(0, 4_000_000_000), st.integers(0, 999_999_999))
def test_every_nanosecond_is_kept(seconds: int, rest: int) -> None:
    text = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}".rstrip("0").rstrip(".") + "Z"
    assert nanoseconds(text) == seconds * 1_000_000_000 + rest


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-28", "0001-01-01T00:00:00Z", "2026-13-01T00:00:00Z"])
def test_an_invalid_time_is_zero(text: str) -> None:
    assert nanoseconds(text) == 0


def test_the_time_zone_is_applied() -> None:
    assert nanoseconds("2026-11-28T02:00:00.5+02:00") == nanoseconds("2026-11-28T00:00:00.5Z")
