"""Test that the checker finds each kind of violation in an altered history, and none in a correct one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.chaos.check import BOUND, REST, check, end_times
from bench.chaos.evidence import Evidence
from bench.chaos.history import (
    AnyRecord,
    Billed,
    CancelAsked,
    Connected,
    Exited,
    Got,
    Healed,
    History,
    Hit,
    Memory,
    Said,
    read_history,
)
from bench.chaos.schedule import LEASE, Fault
from bench.chaos.summary import Summary, summary_of
from tests.support.chaos_history import ANSWER, ISSUER, WALL, Story, event


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_correct_run_has_no_violation(story: Story) -> None:
    assert story.rules() == []


def test_an_accepted_request_without_any_event_is_lost(story: Story) -> None:
    story.log, story.row, story.got = [], {}, {}
    assert story.rules() == ["lost"]


def test_a_generation_without_a_terminal_is_found(story: Story) -> None:
    story.log.pop()
    story.got = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    story.row |= {"state": "running", "status": "running", "next_seq": 4}
    assert story.rules() == ["ends"]


def test_repeats_and_zombies_in_the_log_are_no_violation(story: Story) -> None:
    story.log[2:2] = [dict(ANSWER[1]), event("delta", 3, text="behind a gap", tokens=3)]
    story.log.append(event("delta", 5, text="too late", epoch=0))
    story.got = {0: [0, 1, 4, 5, 6], 1: [0, 1, 4, 5, 6]}
    story.row |= {"duplicates": 1, "gaps": 1, "zombies": 1}
    assert story.rules() == ["two_writers"]  # for the one behind the gap, which no writer may change
    story.log[3] = dict(ANSWER[3])
    assert story.rules() == []


def test_events_after_a_terminal_are_found(story: Story) -> None:
    story.log.append(event("delta", 5, text="more", tokens=3))
    story.row["late"] = 1
    assert story.rules() == ["after_terminal"]


def test_usage_after_the_terminal_is_no_violation(story: Story) -> None:
    story.log.append(event("usage", 5, usage={"input": 20, "output": 2}))
    story.got[1].append(5)
    story.row["next_seq"] = 6
    assert story.rules() == []


def test_two_writers_with_one_epoch_are_found(story: Story) -> None:
    story.log.insert(2, event("delta", 1, text="another", tokens=1))
    story.got = {0: [0, 1, 3, 4, 5], 1: [0, 1, 3, 4, 5]}
    story.row["duplicates"] = 1
    assert story.rules() == ["two_writers"]


@pytest.mark.parametrize(
    ("calls", "good"),
    [
        ([("left", "one"), ("end", "one two")], True),
        ([("end", "one two three")], False),
        ([("end", "one")], False),
        ([("cut", "one two")], False),
        ([("open", "one two")], False),
        ([], False),
    ],
)
def test_a_completed_text_must_be_one_whole_call(story: Story, calls: list[tuple[str, str]], good: bool) -> None:
    story.calls = calls
    assert story.rules() == ([] if good else ["text"])


@pytest.mark.parametrize(
    ("calls", "good"),
    [([("open", "one two three")], True), ([("end", "one two")], True), ([("end", "two one")], False)],
)
def test_an_interrupted_text_must_begin_a_call(story: Story, calls: list[tuple[str, str]], good: bool) -> None:
    story.calls = calls
    story.log[3:] = [event("interrupted", 3, epoch=2, counted={"input": 20, "output": 2})]
    story.got = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    story.row |= {"state": "interrupted", "status": "partial", "input": None, "output": None, "epoch": 2, "next_seq": 4}
    assert story.rules() == ([] if good else ["text"])


def test_the_text_starts_over_at_a_restart(story: Story) -> None:
    story.log[2:2] = [event("restarted", 2, epoch=2)]
    for index, entry in enumerate(story.log[3:], 3):
        entry.update(seq=index, epoch=2)
    story.calls = [("left", "one and more"), ("end", " two")]
    story.got = {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3, 4, 5]}
    story.row |= {"epoch": 2, "next_seq": 6, "counted_input": 2 * 20, "counted_output": 1 + 2}
    assert story.rules() == []


def test_a_cancellation_without_a_request_is_found(story: Story) -> None:
    asks = tuple(msgspec.structs.replace(ask, grace=None) for ask in story.schedule.asks)
    story.schedule = msgspec.structs.replace(story.schedule, asks=asks)
    story.log[4] = event("cancelled", 4, reason="requested", counted={"input": 20, "output": 2})
    story.row |= {"state": "cancelled", "status": "partial"}
    assert story.rules() == ["cancelled"]
    story.more = [CancelAsked(generation="g")]
    assert story.rules() == []


def test_a_generation_with_a_grace_period_may_be_cancelled_without_subscribers(story: Story) -> None:
    asks = tuple(msgspec.structs.replace(ask, grace=2.0) for ask in story.schedule.asks)
    story.schedule = msgspec.structs.replace(story.schedule, asks=asks)
    story.log[4] = event("cancelled", 4, reason="disconnected", counted={"input": 20, "output": 2})
    story.row |= {"state": "cancelled", "status": "partial"}
    assert story.rules() == []


@pytest.mark.parametrize(
    ("got", "rules"),
    [
        ([0, 1, 1, 2, 3, 4], ["repeated"]),
        ([0, 2, 3, 4], ["skipped"]),
        ([0, 1, 2], ["incomplete"]),
        ([1, 2, 3, 4], ["skipped"]),
        ([0, 2, 1, 3, 4], ["cursor", "skipped"]),
    ],
)
def test_a_subscriber_with_other_events_than_the_log_is_found(story: Story, got: list[int], rules: list[str]) -> None:
    for watch in (0, 1):
        whole = Story()
        whole.got[watch] = got
        assert whole.rules() == rules
    assert story.rules() == []


def test_an_event_that_the_log_does_not_keep_is_found(story: Story) -> None:
    records = story.records()
    fake = json.dumps(event("delta", 2, text=" lost", tokens=2), separators=(",", ":"))
    index = next(i for i, r in enumerate(records) if isinstance(r, Got)) + 2
    assert isinstance(records[index], Got)
    records[index] = msgspec.structs.replace(records[index], data=fake)  # type: ignore[assignment]
    assert [v.rule for v in check(Evidence.of(records))] == ["not_in_log"]


def test_an_event_that_the_rule_drops_must_not_be_shown(story: Story) -> None:
    story.log.append(event("delta", 5, text="zombie", epoch=0))
    story.row["zombies"] = 1
    story.got[1].append(5)
    assert story.rules() == ["unaccepted"]


def test_an_event_of_another_session_is_found(story: Story) -> None:
    records = story.records()
    fake = json.dumps(event("delta", 1, text="x") | {"generation": "other"}, separators=(",", ":"))
    first = next(i for i, r in enumerate(records) if isinstance(r, Got))
    records.insert(first, Got(watch=0, cursor=ISSUER.issue(1), data=fake))
    assert [v.rule for v in check(Evidence.of(records))] == ["foreign"]


def test_a_cursor_that_goes_back_is_found(story: Story) -> None:
    records = story.records()
    last = max(i for i, r in enumerate(records) if isinstance(r, Got) and r.watch == 0)
    records[last] = msgspec.structs.replace(records[last], cursor=ISSUER.issue(1))  # type: ignore[call-arg, type-var]
    assert [v.rule for v in check(Evidence.of(records))] == ["cursor"]


@pytest.mark.parametrize(
    ("event_", "data", "found"),
    [
        ("bye", "{}", False),
        ("status", "503 away", False),
        ("status", "410 expired", True),
        ("status", "404 unknown", True),
        ("gap", '{"reason":"log_recreated"}', True),
    ],
)
def test_a_gap_or_a_refused_cursor_is_found(story: Story, event_: str, data: str, found: bool) -> None:
    story.more = [Said(watch=0, event=event_, data=data)]
    assert story.rules() == (["answer"] if found else [])


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({"counted_output": 3}, ["billed"]),
        ({"state": "running"}, ["billed"]),
        ({"output": None}, ["billed"]),
        ({"duplicates": 1}, ["billed"]),
        ({"status": "running"}, ["billed"]),
        ({"status": "drift"}, []),
    ],
)
def test_bills_must_match_the_log(story: Story, change: dict[str, Any], rules: list[str]) -> None:
    story.row |= change
    assert story.rules() == rules


def test_a_generation_is_billed_once(story: Story) -> None:
    story.more = [Billed(row=dict(story.row))]
    assert set(story.rules()) == {"billed"}
    story.more, story.row = [], {}
    assert story.rules() == ["unbilled"]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (Exited(process="producer-0", code=1, asked=False), "crash"),
        (Exited(process="producer-0", code=-9, asked=True), "drain"),
        (Exited(process="producer-0", code=0, asked=True, seconds=60.0), "drain"),
        (Memory(process="node-1", peak=101 << 20), "memory"),
    ],
)
def test_processes_that_fail_hang_or_grow_are_found(story: Story, record: AnyRecord, rule: str) -> None:
    story.more = [record]
    assert story.rules() == [rule]


def test_a_service_may_exit_during_a_broker_outage(story: Story) -> None:
    story.more = [Exited(process="producer-0", code=3, asked=False)]
    assert story.rules() == []


def test_a_just_started_process_may_be_ended_by_sigterm(story: Story) -> None:
    story.more = [Exited(process="producer-0", code=-15, asked=True, age=0.5)]
    assert story.rules() == []
    story.more = [Exited(process="producer-0", code=-15, asked=True, age=60.0)]
    assert story.rules() == ["drain"]


def late(story: Story) -> Story:
    story.log[4]["at"] = WALL + 1.0 + LEASE + BOUND + 5.0
    return story


def test_a_late_end_is_found(story: Story) -> None:
    assert late(story).rules() == ["deadline"]


def test_the_time_of_faults_does_not_count(story: Story) -> None:
    fault = Fault(number=0, at=2.0, seconds=2.0, kind="kill", target="producer-0")
    late(story).more = [Hit(t=2.0, fault=fault), Healed(t=4.0, number=0)]
    assert story.rules() == []
    evidence = Evidence.of(story.records())
    assert end_times(evidence)["g"] == pytest.approx(1.0 + LEASE + BOUND + 5.0 - (2.0 + REST))


def test_a_fault_that_was_never_healed_disturbs_to_the_end(story: Story) -> None:
    fault = Fault(number=0, at=2.0, seconds=2.0, kind="kill", target="producer-0")
    late(story).more = [Hit(t=2.0, fault=fault)]
    assert story.rules() == []


def test_overlapping_faults_count_once(story: Story) -> None:
    faults = [Fault(number=n, at=1.0 + n, seconds=1.0, kind="cut", target="billing-0") for n in range(3)]
    for fault in faults:
        story.more += [Hit(t=fault.at, fault=fault), Healed(t=fault.at + 1, number=fault.number)]
    evidence = Evidence.of(story.records())
    assert evidence.undisturbed(0.0, 100.0, 0.5) == pytest.approx(100.0 - 3.5)
    assert evidence.undisturbed(0.0, 2.0, 0.5) == pytest.approx(1.0)


def test_a_history_round_trips_through_its_file(story: Story, tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for record in story.records():
        history.add(record)
    history.close()
    with history.path.open("ab") as file:
        file.write(b'{"kind":"got","wat')
    assert read_history(history.path) == story.records()


def test_a_history_without_its_first_record_is_refused(story: Story) -> None:
    with pytest.raises(ValueError, match="first record"):
        Evidence.of(story.records()[1:])


def test_the_summary_counts_and_adds_up(story: Story) -> None:
    story.more = [Connected(watch=0, replica=1, cursor="c", status=200)]
    evidence = Evidence.of(story.records())
    total = Summary()
    add: Callable[[Summary], None] = total.add
    for _ in range(2):
        add(summary_of(evidence, []))
    assert (total.runs, total.events, total.received, total.resumes, total.requests) == (2, 10, 20, 2, 2)
    assert total.terminals == {"completed": 2}
    assert total.peak_mb == {"producer": 90}
