"""Test the decision to retry a call, and its pause."""

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from services.producer.core.parts import UpstreamFailure
from services.producer.core.retry import CallFailed, RetryPolicy

SECONDS = st.floats(0.001, 100)


def failure(code: str = "upstream_error", *, recoverable: bool = True, after: float | None = None) -> UpstreamFailure:
    return UpstreamFailure(code, "no", recoverable=recoverable, retry_after=after)


def state(attempt: int, error: BaseException | None = None) -> tenacity.RetryCallState:
    made = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
    made.attempt_number = attempt
    if error is not None:
        made.set_exception((type(error), error, None))
    return made


@given(attempt=st.integers(1, 2_000), base=SECONDS, maximum=SECONDS)
def test_exponential_pauses_are_drawn_below_a_bound_that_doubles(attempt: int, base: float, maximum: float) -> None:
    pause = RetryPolicy(base=base, maximum=maximum).pause(state(attempt))
    assert 0 <= pause <= min(maximum, base * 2.0 ** min(attempt - 1, 100)) * (1 + 1e-9)


def test_full_jitter_uses_the_whole_range() -> None:
    policy = RetryPolicy(base=1.0, maximum=60.0)
    drawn = [policy.pause(state(4)) for _ in range(500)]
    assert min(drawn) < 1
    assert max(drawn) > 7


@given(attempt=st.integers(1, 2_000), base=SECONDS, maximum=SECONDS)
def test_linear_pauses_grow_by_their_base(attempt: int, base: float, maximum: float) -> None:
    pause = RetryPolicy(wait="linear", base=base, maximum=maximum).pause(state(attempt))
    assert min(maximum, base * (attempt - 0.5)) * (1 - 1e-9) <= pause <= min(maximum, base * attempt) * (1 + 1e-9)


@pytest.mark.parametrize("wait", ["exponential", "linear"])
@given(attempt=st.integers(1, 50), asked=st.floats(0, 20), data=st.data())
def test_a_pause_is_never_shorter_than_the_provider_asked_for(
    wait: str, attempt: int, asked: float, data: st.DataObject
) -> None:
    policy = RetryPolicy(wait=wait, base=data.draw(SECONDS), maximum=20.0)  # type: ignore[arg-type]  # one of its words
    assert asked <= policy.pause(state(attempt, CallFailed(failure(after=asked)))) <= 20.0


@pytest.mark.parametrize(("asked", "again"), [(None, True), (0.0, True), (20.0, True), (20.1, False), (3_600.0, False)])
def test_a_retry_after_beyond_the_maximum_is_not_retried(asked: float | None, again: bool) -> None:
    assert RetryPolicy(maximum=20.0).retries(failure("upstream_rate_limited", after=asked)) is again


@pytest.mark.parametrize(
    "code",
    [
        "upstream_rate_limited",
        "upstream_overloaded",
        "upstream_error",
        "upstream_unreachable",
        "upstream_cut_off",
        "deadline_connect",
        "deadline_first_token",
    ],
)
def test_recoverable_failures_are_retried(code: str) -> None:
    assert RetryPolicy().retries(failure(code))
    assert not RetryPolicy().retries(failure(code, recoverable=False))


@pytest.mark.parametrize(
    "code",
    [
        "upstream_unauthorized",
        "upstream_bad_request",
        "upstream_not_found",
        "upstream_malformed",
        "upstream_circuit_open",
    ],
)
def test_permanent_failures_are_not_retried(code: str) -> None:
    assert not RetryPolicy().retries(failure(code))


def test_kinds_of_failures_can_be_chosen() -> None:
    policy = RetryPolicy(on=("upstream_overloaded",))
    assert policy.retries(failure("upstream_overloaded"))
    assert not policy.retries(failure("upstream_error"))
