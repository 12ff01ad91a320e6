"""The load of the open loop, and the search for a capacity."""

import itertools

import pytest

from bench.processes import TooLate
from bench.relay.arrivals import OPEN_SCENARIOS, OpenScenario, schedule
from bench.relay.open_run import CapacityStep, OpenOutcome, capacity
from bench.stats import Latency


def load(**fields: float) -> OpenScenario:
    return OpenScenario(name="x", about="x", **({"starts": 50.0, "seconds": 40.0} | fields))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_starts() -> None:
    assert schedule(load(), 7) == schedule(load(), 7)
    assert schedule(load(), 7) != schedule(load(), 8)


def test_arrivals_are_a_poisson_process_and_lengths_lognormal_within_bounds() -> None:
    starts = schedule(load(), 1)
    assert len(starts) == pytest.approx(2_000, rel=0.1)
    gaps = [b.at - a.at for a, b in itertools.pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.15), "the gaps of a Poisson process are exponential"
    lengths = sorted(start.order.tokens for start in starts)
    assert lengths[len(lengths) // 2] == pytest.approx(150, rel=0.15)
    assert lengths[0] >= 10
    assert lengths[-1] <= 800


def test_stamps_of_answers_do_not_overlap() -> None:
    orders = [start.order for start in schedule(load(seconds=3.0), 1)]
    for before, after in itertools.pairwise(orders):
        assert after.cell == before.cell + before.tokens


def test_shares_of_drops_and_cancels_are_kept_and_exclude_each_other() -> None:
    starts = schedule(load(), 1)
    dropped = sum(bool(start.drop_at) for start in starts) / len(starts)
    cancelled = sum(bool(start.cancel_at) for start in starts) / len(starts)
    assert (dropped, cancelled) == (pytest.approx(0.1, abs=0.02), pytest.approx(0.05, abs=0.02))
    assert not any(start.drop_at and start.cancel_at for start in starts)


def test_starts_together_are_due_at_once() -> None:
    starts = schedule(OPEN_SCENARIOS["together-100"], 1)
    assert [start.at for start in starts] == [0.0] * 100


def outcome(first: float, gap: float) -> OpenOutcome:
    first_ms, gap_ms, none = Latency(1, 1, first, first), Latency(1, 1, gap, gap), Latency(0, 0, 0, 0)
    return OpenOutcome(
        target="t",
        starts=1,
        complete=1,
        cancelled=0,
        failed=0,
        resumes=0,
        mismatches=0,
        tokens=1,
        seconds=1,
        starts_per_s=1,
        very_first_ms=1,
        first_ms=first_ms,
        gap_ms=gap_ms,
        resume_ms=none,
        cpu_ms_per_start={},
        cpu_ms_per_1000=1,
        provider_late_p99_ms=0,
        problems=[],
    )


@pytest.mark.parametrize("limit", [3.0, 17.0, 64.0, 200.0])
def test_the_capacity_is_found_within_its_precision(limit: float) -> None:
    steps: list[CapacityStep] = []

    def measure(scenario: OpenScenario) -> OpenOutcome:
        return outcome(50, 20) if scenario.starts <= limit else outcome(5_000, 20)

    found = capacity(OPEN_SCENARIOS["open-20"], measure, steps.append)
    assert limit / 1.13 <= found <= limit
    assert len(steps) < 12


def test_a_target_that_holds_nothing_has_no_capacity() -> None:
    def measure(_scenario: OpenScenario) -> OpenOutcome:
        raise TooLate("never ready")

    assert capacity(OPEN_SCENARIOS["open-20"], measure, lambda _step: None) == 0
