"""Test that the checker finds violations of durable consumers, the ledger and budgets, over any protocol."""

import json
from decimal import Decimal
from typing import Any

import pytest

from bench.chaos.history import Amounts, Exported, Got, Left, Quiet, Said, Served, Stuck
from bench.chaos.pace import MOST, slowness
from bench.chaos.schedule import DELIVERIES, LONG_SIZE, LONG_TOKENS, draw
from tests.support.chaos_history import ANSWER, ISSUER, LAST, Story, event

COST = Decimal("0.000045000002")
"""20 input tokens at 1.25 and 2 output tokens at 10.000001 a million."""


@pytest.fixture
def story() -> Story:
    return Story()


def data(index: int) -> str:
    return json.dumps(ANSWER[index], separators=(",", ":"))


def served(*indices: int, deliveries: int = 1) -> list[Served]:
    return [Served(worker=0, consumer="c0", data=data(i), deliveries=deliveries) for i in indices]


def money(amount: Decimal = COST, tokens: int = 22, **more: Any) -> Amounts:
    entry = {"generation": "g", "number": 1, "kind": "charge", "amount": str(amount), "currency": "USD"}
    spending = {"day": 0, "currency": "USD", "tokens": tokens, "amount": str(amount)}
    return Amounts(**({"entries": [entry], "spending": [spending], "reserved": []} | more))


def test_a_consumer_that_received_every_event_once_passes(story: Story) -> None:
    story.more = [*served(*range(LAST)), *served(2, 3, deliveries=2)]
    assert story.rules() == []


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        (served(0, 1, 3, 4), ["unserved"]),
        ([*served(*range(LAST)), *served(2)], ["new_twice"]),
        ([*served(*range(LAST)), Served(worker=0, consumer="c0", data="{}", deliveries=1)], ["not_in_log"]),
    ],
)
def test_missing_and_repeated_events_of_a_consumer_are_found(
    story: Story, given: list[Served], rules: list[str]
) -> None:
    story.more = [*given]
    assert story.rules() == rules


def test_money_that_equals_the_price_of_the_usage_passes(story: Story) -> None:
    story.more = [money()]
    assert story.rules() == []


CALL = {"number": 1, "code": "upstream_cut_off", "counted": {"input": 20, "output": 3}}


@pytest.mark.parametrize(
    ("call", "cost", "tokens", "columns"),
    [
        (CALL, "0.000055000003", 23, (40, 5, 20, 2)),
        (None, "0.000035000001", 21, (40, 3, 20, 2)),
        (CALL | {"usage": {"input": 21, "output": 4}}, "0.000066250004", 25, (40, 5, 41, 6)),
    ],
)
def test_abandoned_calls_are_part_of_the_bill(
    story: Story, call: dict[str, Any] | None, cost: str, tokens: int, columns: tuple[int, ...]
) -> None:
    story.log[2:2] = [event("restarted", 2, epoch=2, **({"call": call} if call else {}))]
    for index, entry in enumerate(story.log[3:], 3):
        entry.update(seq=index, epoch=2)
    story.calls = [("left", "one and more"), ("end", " two")]
    story.got = {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3, 4, 5]}
    names = ("counted_input", "counted_output", "input", "output")
    story.row |= {"epoch": 2, "next_seq": 6} | dict(zip(names, columns, strict=True))
    story.more = [money(COST + Decimal(cost), 22 + tokens)]
    assert story.rules() == []
    story.more = [money()]
    assert story.rules() == ["ledger", "spending"]


@pytest.mark.parametrize(
    ("amounts", "rules"),
    [
        (money(COST + 1), ["ledger", "spending"]),
        (money(tokens=21), ["spending"]),
        (money(spending=[]), ["spending", "spending"]),
        (money(entries=[]), ["ledger", "spending", "spending"]),
        (money(reserved=[{"generation": "g", "currency": "USD", "tokens": 5, "amount": "1"}]), ["reserved"]),
        (
            money(entries=[{"generation": "g", "number": 2, "kind": "charge", "amount": str(COST), "currency": "USD"}]),
            ["ledger"],
        ),
    ],
)
def test_money_that_differs_is_found(story: Story, amounts: Amounts, rules: list[str]) -> None:
    story.more = [amounts]
    assert story.rules() == rules


def test_an_export_changes_the_expected_row_and_price(story: Story) -> None:
    exported = Exported(generation="g", input=30, output=4)
    cost = (30 * Decimal("1.25") + 4 * Decimal("10.000001")) / 1_000_000
    story.more = [exported, money(cost, 34)]
    assert story.rules() == ["billed"]
    story.row |= {"input": 30, "output": 4}
    assert story.rules() == []
    story.more = [exported, money()]
    assert story.rules() == ["ledger", "spending"]


def binary(story: Story, **changes: Any) -> None:
    """Give the story a subscriber of a wire without JSON; its second event is spoilt by ``changes``."""
    for seq, own in enumerate(ANSWER):
        fields = {"type": own["type"], "text": own.get("text", "")} | (changes if seq == 1 else {})
        story.more.append(
            Got(watch=2, cursor=ISSUER.issue(seq + 1), generation="g", epoch=1, seq=seq, **fields)  # type: ignore[arg-type]  # texts
        )
    story.more.append(Left(watch=2, session="s1", generation="g", start=0, complete=True))


def test_events_of_a_binary_protocol_are_compared_by_position_type_and_text(story: Story) -> None:
    binary(story)
    assert story.rules() == []


@pytest.mark.parametrize("changes", [{"text": "other"}, {"type": "notice"}])
def test_events_of_a_binary_protocol_that_differ_are_found(story: Story, changes: dict[str, str]) -> None:
    binary(story, **changes)
    assert story.rules() == ["not_in_log"]


def test_credentials_that_expired_on_the_way_are_no_violation(story: Story) -> None:
    story.more = [Said(watch=0, event="status", data="401 expired"), Stuck(watch=0, ended=True)]
    assert story.rules() == []


def test_timeouts_grow_with_the_machine_load_up_to_a_bound() -> None:
    assert slowness(0.5, 2) == 1.0
    assert slowness(8.0, 2) == 2.0
    assert slowness(1_000.0, 2) == MOST


@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_an_end_may_take_longer_on_a_slow_machine(story: Story, slow: float) -> None:
    story.log[-1]["at"] += 30.0
    story.more = [Quiet(t=11.0, slowness=slow)]
    assert story.rules() == (["deadline"] if slow == 1.0 else [])


@pytest.mark.parametrize("seed", range(20))
def test_every_minute_has_a_rolling_restart_and_clients_that_read_nothing(seed: int) -> None:
    schedule = draw(seed, 60.0)
    rolls = [fault for fault in schedule.faults if fault.kind == "roll"]
    assert len(rolls) == 1
    other = [f for f in schedule.faults if f.target in DELIVERIES]
    assert all(f.at + f.seconds <= rolls[0].at or f.at >= rolls[0].at + rolls[0].seconds for f in other)
    stuck = [watch for watch in schedule.watches if watch.stuck]
    assert len(stuck) == 2
    assert all((schedule.asks[w.ask].tokens, schedule.asks[w.ask].size) == (LONG_TOKENS, LONG_SIZE) for w in stuck)
