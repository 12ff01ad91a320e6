"""Test the token bucket that limits a provider's calls per minute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.producer.core.token_bucket import TokenBucket


def test_a_full_bucket_allows_its_capacity_at_once_and_then_returns_the_wait() -> None:
    bucket = TokenBucket(3, 60.0)
    assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 20.0]


def test_a_token_is_available_after_the_wait() -> None:
    bucket = TokenBucket(2, 60.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0.0, 0.0, 30.0]
    assert bucket.take(29.0) == pytest.approx(1.0)
    assert [bucket.take(30.0), bucket.take(30.0)] == [0.0, 30.0]


def test_a_refused_call_takes_nothing() -> None:
    bucket = TokenBucket(1, 60.0)
    bucket.take(0.0)
    for _ in range(100):
        assert bucket.take(30.0) == pytest.approx(30.0)
    assert bucket.take(60.0) == 0.0


@given(st.integers(1, 20), st.lists(st.floats(0.0, 30.0), max_size=200))
def test_never_more_than_the_capacity_and_the_refill_is_allowed(capacity: int, pauses: list[float]) -> None:
    bucket, now, taken = TokenBucket(capacity, 60.0), 0.0, 0
    for pause in pauses:
        now += pause
        taken += bucket.take(now) == 0.0
    assert taken <= capacity + now * capacity / 60.0 + 1e-6
