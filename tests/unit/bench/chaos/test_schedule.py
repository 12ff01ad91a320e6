"""Test schedules: determined by their seed, healed in time, one fault per target; and their shrinking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos.command import parse_seeds
from bench.chaos.schedule import Shape, draw, shape_of
from bench.chaos.shrink import shrink

SEEDS = st.integers(0, 10_000)


@given(SEEDS)
def test_a_seed_always_gives_the_same_schedule(seed: int) -> None:
    assert draw(seed, 30.0) == draw(seed, 30.0)


@given(SEEDS, st.sampled_from((1, 3)))
def test_all_faults_are_healed_before_the_end(seed: int, nodes: int) -> None:
    schedule = draw(seed, 30.0, Shape(nodes=nodes))
    assert schedule.faults
    for fault in schedule.faults:
        assert fault.seconds > 0
        assert fault.at + fault.seconds <= 28.01
        assert fault.node is None or fault.node < nodes


@given(SEEDS)
def test_a_target_has_one_fault_at_a_time_and_the_broker_loses_one_node_unless_all(seed: int) -> None:
    ends: dict[str, float] = {}
    for fault in draw(seed, 60.0).faults:
        key = "nodes" if fault.target.startswith("node") else fault.target
        assert ends.get(key, 0.0) <= fault.at
        ends[key] = fault.at + fault.seconds


@given(SEEDS)
def test_subscribers_and_cancellations_belong_to_requests(seed: int) -> None:
    schedule = draw(seed, 20.0)
    known = range(len(schedule.asks))
    assert all(watch.ask in known and len(watch.replicas) == len(watch.stays) + 1 for watch in schedule.watches)
    assert all(cancel.ask in known for cancel in schedule.cancels)
    assert len({ask.key for ask in schedule.asks}) == len(schedule.asks)


def test_faults_can_be_limited_to_kinds_and_targets() -> None:
    faults = draw(3, 60.0, Shape(kinds={"hold": 1.0}, targets=("producer-0",))).faults
    assert {(fault.kind, fault.target) for fault in faults} == {("hold", "producer-0")}


def test_targets_may_be_named_by_prefix() -> None:
    shape = shape_of(3, ("cut", "hold"), ("producer", "node-2"))
    assert set(shape.kinds) == {"cut", "hold"}
    assert shape.targets == ("producer-0", "producer-1", "node-2")
    assert shape_of(1) == Shape(nodes=1)
    with pytest.raises(ValueError, match="target 'producers' is unknown"):
        shape_of(3, (), ("producers",))
    with pytest.raises(ValueError, match="no fault of cut applies to node-0"):
        shape_of(1, ("cut",), ("node",))


@given(SEEDS, st.lists(st.sampled_from(("node", "producer-1", "delivery"))))
def test_limited_faults_affect_no_other_target(seed: int, targets: list[str]) -> None:
    faults = draw(seed, 20.0, shape_of(3, (), targets)).faults
    assert not targets or all(fault.target.startswith(tuple(targets)) for fault in faults)


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1,,2"])
def test_an_invalid_seed_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="use numbers and ranges"):
        parse_seeds(text)


def test_seeds_are_ranges_and_numbers() -> None:
    assert parse_seeds("1-3,9") == [1, 2, 3, 9]


@given(st.integers(1, 20), st.data())
async def test_shrinking_finds_exactly_the_faults_that_matter(count: int, data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.integers(0, count - 1), max_size=3))

    async def shows(items: list[int]) -> bool:
        return needed <= set(items)

    assert set(await shrink(range(count), shows, 1_000)) == needed


@given(st.integers(0, 12))
async def test_shrinking_stays_within_its_runs_and_returns_only_failing_sets(runs: int) -> None:
    asked: list[list[int]] = []

    async def shows(items: list[int]) -> bool:
        asked.append(items)
        return {3, 7} <= set(items)

    found = await shrink(range(10), shows, runs)
    assert len(asked) <= runs
    assert {3, 7} <= set(found)
