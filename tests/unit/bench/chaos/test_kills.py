"""Test the log of the kill runs: it contains every kind of fault and is determined by its seed."""

from hypothesis import given
from hypothesis import strategies as st

from bench.chaos.bills import check_bills, expected_row
from bench.chaos.evidence import Evidence
from bench.chaos.history import Amounts, Billed, Logged, Opened
from bench.chaos.kills_log import messages, name_of
from bench.chaos.money import check_money
from bench.chaos.schedule import Schedule
from bench.chaos.told import tell

PARTITIONS = 2


def logged(seed: int, generations: int) -> list[Logged]:
    return [
        Logged(partition=int(subject.split(".")[1]), seq=seq, subject=subject, data=data.decode())
        for seq, (subject, data) in enumerate(messages(seed, generations, PARTITIONS), 1)
    ]


def test_a_seed_always_gives_the_same_log() -> None:
    assert logged(3, 200) == logged(3, 200)
    assert logged(3, 200) != logged(4, 200)


@given(st.integers(0, 10_000))
def test_every_generation_has_one_terminal_despite_repeats(seed: int) -> None:
    told = tell(logged(seed, 100))
    assert set(told) == {name_of(number) for number in range(100)}
    assert all(len(generation.terminals) == 1 for generation in told.values())


def test_the_log_contains_every_kind_of_fault() -> None:
    told = tell(logged(1, 400)).values()
    assert {t.terminals[0].type for t in told} == {"completed", "failed", "cancelled", "interrupted"}
    assert all(sum(t.dropped[reason] for t in told) > 0 for reason in ("duplicates", "gaps", "zombies", "late"))
    usages = [[entry.type for entry in t.accepted].count("usage") for t in told]
    assert {0, 1, 2} <= set(usages)
    assert any(entry.type == "restarted" for t in told for entry in t.accepted)


def test_money_that_differs_from_the_log_is_found() -> None:
    log = logged(2, 30)
    schedule = Schedule(seed=2, seconds=1, nodes=1, asks=(), watches=(), cancels=(), faults=())
    amounts = Amounts(entries=[], spending=[], reserved=[])
    rows = [
        Billed(row=expected_row(told) | {"generation": name, "status": "running"}) for name, told in tell(log).items()
    ]
    evidence = Evidence.of([Opened(schedule=schedule, wall=0.0, lease=0.0), *log, *rows[1:], amounts])
    assert {violation.rule for violation in check_bills(evidence)} == {"unbilled", "billed"}
    assert {violation.rule for violation in check_money(evidence)} == {"ledger"}
