"""Billing's fold, reconciliation and sequencing, without any input or output."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING, judge
from schemas.codec import encode_event
from schemas.events import Cancelled, Completed, Delta, Failed, Interrupted, Restarted, UsageReported
from schemas.subjects import token_subject
from schemas.usage import Counted, Usage
from services.billing.core.batch import fold_batch, group
from services.billing.core.fold import fold
from services.billing.core.generation import Generation, Key
from services.billing.core.intake import Record, read_record
from services.billing.core.reconciliation import Policy, reconcile
from services.billing.core.sequence import join
from services.billing.core.settlement import Terms
from tests.support.billing_histories import START, address, history, records

POLICY = Policy()
TERMS = Terms(policy=POLICY)
LATER = round((START + 10_000) * 1_000)
SOON = round((START + 10) * 1_000)
USAGE = Usage(input=7, output=30)


def settled(events, now=SOON, policy=POLICY) -> Generation:  # type: ignore[no-untyped-def]
    generation = fold(None, address(), records(events)).generation
    assert generation is not None
    return reconcile(generation, now, policy)


def test_counts_run_while_the_generation_streams() -> None:
    g = settled(history(terminal=None))
    assert (g.state, g.status, g.counted_input, g.counted_output) == ("running", "running", 7, 30)
    assert (g.model, g.provider, g.started_at, g.ended_at) == ("gpt", "openai", round(START * 1_000), None)


def test_equal_numbers_match() -> None:
    g = settled(history(reported=USAGE))
    assert (g.status, g.drift_input, g.drift_output, g.input, g.output) == ("matched", 0, 0, 7, 30)


@pytest.mark.parametrize(
    ("reported", "status"),
    [(38, "matched"), (39, "drift"), (22, "matched"), (21, "drift")],
)
def test_a_difference_beyond_the_absolute_tolerance_is_drift(reported: int, status: str) -> None:
    g = settled(history(reported=Usage(input=7, output=reported)))
    assert (g.status, g.drift_output) == (status, reported - 30)


def test_the_larger_of_both_tolerances_applies() -> None:
    policy = Policy(absolute=8, relative=0.02)
    assert policy.agree(980, 1_000)
    assert not policy.agree(979, 1_000)
    assert policy.agree(8, 0)


def test_drifting_input_is_drift_unless_input_was_not_counted() -> None:
    assert settled(history(reported=Usage(input=700, output=30))).status == "drift"
    uncounted = [e for e in history(reported=Usage(input=700, output=30)) if not isinstance(e, Completed)]
    uncounted[0].counted = Counted()  # type: ignore[attr-defined]
    g = settled([*uncounted, Completed(generation="g", finish_reason="stop", seq=5, at=START)])
    assert (g.status, g.drift_input) == ("matched", None)


def test_completed_without_usage_waits_and_then_misses_the_provider() -> None:
    g = settled(history())
    assert g.status == "awaiting_provider"
    assert g.settle_at == round((START + 3 + 300) * 1_000)
    assert reconcile(g, g.settle_at - 1, POLICY).status == "awaiting_provider"
    missing = reconcile(g, g.settle_at, POLICY)
    assert (missing.status, missing.settle_at) == ("provider_missing", None)


def test_usage_after_the_terminal_is_reconciled_again() -> None:
    events = history()
    g = reconcile(settled(events), LATER, POLICY)
    assert g.status == "provider_missing"
    late = UsageReported(generation="g", seq=len(events), at=START + 9_000, usage=USAGE, source="lookup")
    after = fold(g, address(), records([late], 100)).generation
    assert after is not None
    after = reconcile(after, LATER, POLICY)
    assert (after.status, after.usage_source, after.reported_at) == (
        "matched",
        "lookup",
        round((START + 9_000) * 1_000),
    )
    newer = UsageReported(generation="g", seq=len(events) + 1, usage=Usage(input=7, output=300))
    last = fold(after, address(), records([newer], 101)).generation
    assert last is not None
    assert reconcile(last, LATER, POLICY).status == "drift"


@pytest.mark.parametrize("terminal", [Failed, Cancelled, Interrupted])
def test_a_generation_that_did_not_complete_is_partial_with_or_without_usage(terminal) -> None:  # type: ignore[no-untyped-def]
    for reported in (None, USAGE):
        g = settled(history(reported=reported, terminal=terminal))
        assert (g.status, g.state, g.counted_output) == ("partial", terminal.__struct_config__.tag, 30)


def test_the_count_of_the_terminal_replaces_the_running_count_when_present() -> None:
    events = history(terminal=None)
    assert (
        settled(
            [*events, Completed(generation="g", finish_reason="stop", seq=4, counted=Counted(output=31))]
        ).counted_output
        == 31
    )
    assert settled([*events, Completed(generation="g", finish_reason="stop", seq=4)]).counted_output == 30


def test_a_restart_is_applied_and_zombie_events_are_dropped() -> None:
    events = history(terminal=None)
    restarted = Restarted(generation="g", seq=4, epoch=2, reason="producer_lost", provider="other")
    zombie = Delta(generation="g", seq=5, epoch=1, text="x", tokens=99)
    fresh = Delta(generation="g", seq=5, epoch=2, text="x", tokens=40)
    g = settled([*events, restarted, zombie, fresh])
    assert (g.provider, g.counted_output, g.zombies, g.epoch) == ("other", 30 + 40, 1, 2)


def test_an_unknown_type_occupies_its_seq_and_is_counted() -> None:
    raw = [encode_event(e) for e in history(terminal=None)]
    raw.append(b'{"type":"hologram","generation":"g","seq":4}')
    raw.append(encode_event(Completed(generation="g", finish_reason="stop", seq=5)))
    subject = token_subject(address())
    g = fold(None, address(), [read_record(i, subject, data) for i, data in enumerate(raw, 1)]).generation
    assert g is not None
    assert (g.state, g.unknown) == ("completed", 1)


def test_a_malformed_terminal_still_ends_the_generation() -> None:
    subject = token_subject(address())
    broken = read_record(9, subject, b'{"type":"failed","generation":"g","seq":4,"code":17}')
    g = fold(None, address(), [*records(history(terminal=None)), broken]).generation
    assert g is not None
    assert (g.state, g.malformed, reconcile(g, SOON, POLICY).status) == ("failed", 1, "partial")


@given(st.binary(max_size=200) | st.sampled_from([b"", b"null", b"[]", b'{"seq":1}', b'{"type":"delta"}']))
def test_any_bytes_are_a_record_and_never_an_error(data: bytes) -> None:
    record = read_record(1, token_subject(address()), data)
    folded = fold(None, address(), [record])
    assert folded.generation is None or folded.verdicts.total() == 1


def test_hostile_texts_and_times_are_sanitised_for_the_database() -> None:
    events = history(model="m\0" + "x" * 10_000, at=1e300)
    g = settled(events)
    assert g.model == "m" + "x" * 199
    assert g.started_at == 0


def test_a_generation_with_an_expired_head_is_joined_and_marked_headless() -> None:
    g = fold(None, address(), records(history(reported=USAGE))[2:]).generation
    assert g is not None
    assert (g.headless, g.counted_output, g.output, g.state) == (True, 30, 30, "completed")


def test_subjects_that_name_no_generation_are_strays() -> None:
    groups, strays = group([Record(1, "tokens.0.a.b", None), *records(history())])
    assert (len(groups), strays) == (1, 1)


def test_fold_does_not_change_its_input() -> None:
    known = fold(None, address(), records(history(terminal=None))).generation
    assert known is not None
    before = msgspec.structs.replace(known)
    fold(known, address(), records(history())[4:])
    assert known == before


histories = st.lists(
    st.builds(
        history,
        deltas=st.integers(0, 6),
        reported=st.none() | st.builds(Usage, input=st.integers(0, 50), output=st.integers(0, 80)),
        terminal=st.sampled_from([None, Completed, Failed, Cancelled, Interrupted]),
    ),
    min_size=1,
    max_size=5,
)


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """A partition's log: several generations interleaved, each with repeats as a go-back-N writer makes them."""
    queues = []
    for number, events in enumerate(draw(histories)):
        for event in events:
            event.generation = f"g{number}"
        written = []
        for end in range(1, len(events) + 1):
            written.append(events[end - 1])
            if draw(st.integers(0, 5)) == 0:
                written += events[draw(st.integers(0, end - 1)) : end]
        queues.append(written)
    log = []
    while any(queues):
        log.append(draw(st.sampled_from([q for q in queues if q])).pop(0))
    return records(log)


def apply(known: dict[Key, Generation], batch: list[Record]) -> dict[Key, Generation]:
    groups, _strays = group(batch)
    made = fold_batch(groups, known, SOON, TERMS)
    return known | {g.key: g for g in [*made.whole, *made.progress]}


@settings(max_examples=150)
@given(logs(), st.data())
def test_rows_are_the_same_under_any_batching_and_redelivery(log: list[Record], data: st.DataObject) -> None:
    expected = apply({}, log)
    rows: dict[Key, Generation] = {}
    applied = 0
    while applied < len(log):
        # What a consumer may bring: anything stored so far, in any order, any number of times.
        stored = data.draw(st.integers(applied + 1, len(log)))
        delivered = data.draw(st.lists(st.sampled_from(log[:stored]), max_size=12))
        joined = join(applied, delivered or log[applied:stored])
        ready = list(joined.ready) if joined.read_up_to is None else log[applied : joined.read_up_to]
        assert [r.seq for r in ready] == list(range(applied + 1, applied + len(ready) + 1))
        rows = apply(rows, ready)
        applied += len(ready)
    assert rows == expected


@given(logs())
def test_every_event_is_judged_by_the_one_rule(log: list[Record]) -> None:
    groups, _strays = group(log)
    for one in groups:
        position, verdicts = BEGINNING, Counter[str]()
        for record in one.records:
            assert record.header is not None
            position, verdict = judge(position, record.header.type, record.header.epoch, record.header.seq)
            verdicts[verdict.value] += 1
        folded = fold(None, one.address, one.records)
        assert folded.generation is not None
        assert (folded.generation.position, folded.verdicts) == (position, verdicts)


@given(logs())
def test_folding_the_whole_log_again_changes_no_number(log: list[Record]) -> None:
    rows = apply({}, log)
    again = apply(rows, log)
    for key, g in rows.items():
        dropped = {name: getattr(g, name) for name in ("log_seq", "duplicates", "late", "gaps", "zombies")}
        assert msgspec.structs.replace(again[key], **dropped) == g
