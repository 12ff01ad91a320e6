"""Test the acceptance rule: every reader accepts the same complete sequence, under any writers and network."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from schemas.acceptance import BEGINNING, Acceptance, Position, Verdict, highest_epoch, judge
from schemas.codec import Header
from schemas.events import TERMINAL_TYPES
from tests.support.log_model import TERMINAL, Entry, Log, Writer, accepted, position_of

TAKEOVERS = {*TERMINAL_TYPES, "restarted"}
TYPES = ["started", "delta", "notice", "usage", "of_a_later_version", *sorted(TAKEOVERS)]
ENTRIES = st.builds(Entry, st.sampled_from(TYPES), st.integers(1, 3), st.integers(0, 5), st.just(0))


def by_definition(log: list[Entry]) -> list[Entry]:
    """The accepted sequence as a statement about the whole log: each next one is the earliest entry that can follow."""
    chain: list[Entry] = []
    at = -1
    while (following := next((i for i in range(at + 1, len(log)) if follows(chain, log[i])), None)) is not None:
        at = following
        chain.append(log[at])
    return chain


def follows(chain: list[Entry], entry: Entry) -> bool:
    if not chain:
        return entry.seq == 0
    last, ended = chain[-1], any(e.type in TERMINAL_TYPES for e in chain)
    if entry.seq != last.seq + 1:
        return False
    if entry.epoch == last.epoch:
        return not ended or entry.type == "usage"
    return entry.epoch > last.epoch and entry.type in TAKEOVERS and not ended


def check_shape(sequence: list[Entry]) -> None:
    assert [e.seq for e in sequence] == list(range(len(sequence)))
    for before, after in pairwise(sequence):
        assert after.epoch == before.epoch or (after.epoch > before.epoch and after.type in TAKEOVERS)
    ends = [i for i, e in enumerate(sequence) if e.type in TERMINAL_TYPES]
    assert len(ends) <= 1
    if ends:
        assert all(e.type == "usage" and e.epoch == sequence[ends[0]].epoch for e in sequence[ends[0] + 1 :])


@settings(deadline=None, max_examples=500)
@given(st.lists(ENTRIES, max_size=40))
def test_any_log_yields_the_sequence_of_the_definition(log: list[Entry]) -> None:
    assert accepted(log) == by_definition(log)
    check_shape(accepted(log))


@settings(deadline=None)
@given(st.lists(ENTRIES, max_size=30), st.data())
def test_rereading_from_any_earlier_event_changes_nothing(log: list[Entry], data: st.DataObject) -> None:
    again = data.draw(st.integers(0, len(log)))
    start = data.draw(st.integers(0, again))
    position = position_of(log[:again])
    for entry in accepted(log[:again])[start:]:
        unchanged, verdict = judge(position, entry.type, entry.epoch, entry.seq)
        assert unchanged == position
        assert verdict is not Verdict.ACCEPTED


@settings(deadline=None)
@given(st.lists(ENTRIES, max_size=30), st.integers(0, 30))
def test_a_reader_that_resumes_at_its_position_accepts_the_same_events(log: list[Entry], stop: int) -> None:
    position, later = position_of(log[:stop]), []
    for entry in log[stop:]:
        position, verdict = judge(position, entry.type, entry.epoch, entry.seq)
        later += [entry] if verdict is Verdict.ACCEPTED else []
    assert accepted(log[:stop]) + later == accepted(log)


class Producers(RuleBasedStateMachine):
    """Producers that lose their lease at the worst time, over a network that loses, repeats and delays."""

    writers = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.all: list[Writer] = []
        self.before: list[Entry] = []

    @rule(
        target=writers,
        deltas=st.integers(0, 6),
        late_usage=st.integers(0, 2),
        restart=st.booleans(),
    )
    def takes_the_request(self, deltas: int, late_usage: int, restart: bool) -> Writer:
        writer = Writer(len(self.all), ["delta"] * deltas + ["usage", TERMINAL] + ["usage"] * late_usage)
        self.all.append(writer)
        writer.look(self.log, restart=restart)
        return writer

    @rule(writer=writers)
    def opens(self, writer: Writer) -> None:
        if not writer.opened and not writer.refused:
            writer.open(self.log)

    @rule(writer=writers, restart=st.booleans())
    def looks_again_after_a_refusal(self, writer: Writer, restart: bool) -> None:
        if writer.refused:
            writer.refused = False
            writer.look(self.log, restart=restart)

    @rule(writer=writers, events=st.integers(1, 5))
    def publishes(self, writer: Writer, events: int) -> None:
        for _ in range(events if writer.opened else 0):
            writer.send()

    @rule(
        writer=writers,
        connection=st.integers(0, 3),
        copies=st.integers(1, 5),
        lose=st.booleans(),
        lose_ack=st.booleans(),
    )
    def network_moves(self, writer: Writer, connection: int, copies: int, lose: bool, lose_ack: bool) -> None:
        for _ in range(copies):
            writer.deliver(self.log, connection, lose=lose, lose_ack=lose_ack)

    @rule(writer=writers, which=st.integers(0, 9), times=st.integers(1, 5))
    def acknowledgements_arrive(self, writer: Writer, which: int, times: int) -> None:
        for _ in range(times):
            writer.hear(which)

    @rule(writer=writers, reconnect=st.booleans())
    def goes_back(self, writer: Writer, reconnect: bool) -> None:
        if writer.opened:
            writer.go_back(reconnect=reconnect)

    @precondition(lambda self: self.log.entries)
    @rule(data=st.data())
    def something_stored_is_stored_once_more(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.log.entries))
        # A conditional append cannot repeat; everything else can.
        if entry.content.split(":")[1] != "0":
            self.log.append(entry)

    @invariant()
    def readers_agree_with_the_definition(self) -> None:
        now = accepted(self.log.entries)
        check_shape(now)
        assert now == by_definition(self.log.entries)
        assert now[: len(self.before)] == self.before, "what was accepted stays accepted"
        self.before = now

    @invariant()
    def what_counts_as_acknowledged_is_accepted_until_somebody_takes_over(self) -> None:
        now = set(accepted(self.log.entries))
        newest = max((w.epoch for w in self.all if w.opened), default=0)
        for writer in self.all:
            if writer.opened and writer.epoch == newest:
                assert set(writer.events[: writer.base]) <= now

    @invariant()
    def each_epoch_has_one_writer(self) -> None:
        epochs = [w.epoch for w in self.all if w.opened]
        assert len(epochs) == len(set(epochs))

    def teardown(self) -> None:
        in_charge = sorted((w for w in self.all if w.opened), key=lambda w: w.epoch)
        for writer in reversed(in_charge):  # the zombies wake up last
            writer.finish(self.log)
        expected: list[Entry] = []
        for writer, successor in zip(in_charge, [*in_charge[1:], None], strict=False):
            until = successor.first_seq if successor else len(writer.events) + writer.first_seq
            expected += [e for e in writer.events if e.seq < until]
        assert accepted(self.log.entries) == expected
        if in_charge:
            assert in_charge[-1].done
            assert position_of(self.log.entries).ended


TestProducers = Producers.TestCase
TestProducers.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)


def verdicts(*log: tuple[str, int, int]) -> list[str]:
    position, out = BEGINNING, []
    for type_, epoch, seq in log:
        position, verdict = judge(position, type_, epoch, seq)
        out.append(verdict.value)
    return out


def test_a_generation_may_begin_in_any_epoch() -> None:
    assert verdicts(("started", 4, 0), ("delta", 4, 1), ("started", 1, 0)) == ["accepted", "accepted", "zombie"]


def test_a_later_epoch_without_a_takeover_is_a_zombie() -> None:
    assert verdicts(("started", 1, 0), ("delta", 2, 1), ("started", 2, 1)) == ["accepted", "zombie", "zombie"]


def test_a_takeover_at_the_wrong_seq_does_not_take_over() -> None:
    assert verdicts(("started", 1, 0), ("restarted", 2, 0), ("restarted", 2, 2), ("delta", 1, 1)) == [
        "accepted",
        "duplicate",
        "gap",
        "accepted",
    ]


def test_a_restart_within_an_epoch_continues_the_sequence() -> None:
    assert verdicts(("started", 1, 0), ("restarted", 1, 1), ("delta", 1, 2)) == ["accepted"] * 3


@pytest.mark.parametrize("terminal", sorted(TERMINAL_TYPES))
def test_after_a_terminal_only_usage_of_its_own_epoch_is_accepted(terminal: str) -> None:
    log = [
        ("started", 1, 0),
        (terminal, 2, 1),
        ("usage", 1, 2),
        ("usage", 3, 2),
        ("delta", 2, 2),
        ("restarted", 3, 2),
        (terminal, 3, 2),
        ("usage", 2, 2),
        ("usage", 2, 2),
        ("usage", 2, 3),
        ("usage", 2, 5),
    ]
    assert verdicts(*log) == [
        *("accepted", "accepted", "zombie", "zombie", "ended", "ended", "ended"),
        *("accepted", "duplicate", "accepted", "gap"),
    ]


def test_an_unknown_type_occupies_its_seq() -> None:
    assert verdicts(("started", 1, 0), ("of_a_later_version", 1, 1), ("delta", 1, 2)) == ["accepted"] * 3


def test_events_stored_behind_a_missing_event_are_accepted_when_repeated() -> None:
    log = [("started", 1, 0), ("delta", 1, 2), ("delta", 1, 3), ("delta", 1, 1), ("delta", 1, 2), ("delta", 1, 3)]
    assert verdicts(*log) == ["accepted", "gap", "gap", "accepted", "accepted", "accepted"]


def header(type_: str, epoch: int, seq: int) -> Header:
    return Header("g", seq, type_, epoch)


@settings(deadline=None, max_examples=300)
@given(st.lists(ENTRIES, max_size=40))
def test_acceptance_equals_judge(log: list[Entry]) -> None:
    acceptance, position = Acceptance(), BEGINNING
    for at, entry in enumerate(log, 1):
        position, verdict = judge(position, entry.type, entry.epoch, entry.seq)
        again = acceptance.copy()
        assert acceptance.offer(header(entry.type, entry.epoch, entry.seq), at) is verdict
        assert again.offer(header(entry.type, entry.epoch, entry.seq), at) is verdict
        assert (acceptance.position, acceptance.through) == (position, at)
    assert acceptance.highest == max((e.epoch for e in log), default=0)
    assert not acceptance.headless


def test_a_reader_joins_at_the_oldest_event_of_the_highest_kept_epoch() -> None:
    log = [("delta", 1, 2), ("delta", 2, 3), ("delta", 1, 3), ("completed", 2, 4), ("usage", 2, 5)]
    acceptance = Acceptance()
    assert acceptance.lacks(header(*log[0]))
    acceptance.join(highest_epoch(header(*event) for event in log))
    said = [acceptance.offer(header(*event), at).value for at, event in enumerate(log, 11)]
    assert said == ["zombie", "accepted", "zombie", "accepted", "accepted"]
    assert (acceptance.headless, acceptance.joined_at, acceptance.gap_before(12)) == (True, 12, "beginning_expired")
    assert acceptance.gap_before(14) == ""


def test_events_accepted_before_a_loss_are_not_accepted_again() -> None:
    acceptance = Acceptance(Position(1, 5))
    assert acceptance.lacks(header("delta", 1, 8))
    acceptance.join(2)
    log = [("delta", 1, 8), ("delta", 2, 4), ("delta", 2, 9), ("delta", 2, 10)]
    said = [acceptance.offer(header(*event), at).value for at, event in enumerate(log, 21)]
    assert said == ["zombie", "duplicate", "accepted", "accepted"]
    assert acceptance.gap_before(23) == "events_expired"


def test_a_later_epoch_without_its_restarted_event_lacks_events() -> None:
    acceptance = Acceptance(Position(1, 5))
    assert acceptance.lacks(header("delta", 2, 5))
    assert not acceptance.lacks(header("restarted", 2, 5))
    assert not acceptance.lacks(header("delta", 1, 5))
    assert not acceptance.lacks(header("delta", 1, 4))


def test_expect_suppresses_lacks_until_the_next_accepted_event() -> None:
    acceptance = Acceptance(Position(1, 5))
    acceptance.expect()
    assert not acceptance.lacks(header("delta", 1, 8))
    assert acceptance.offer(header("delta", 1, 5)) is Verdict.ACCEPTED
    assert acceptance.lacks(header("delta", 1, 8))


def test_an_ended_generation_lacks_only_usage_of_its_own_epoch() -> None:
    acceptance = Acceptance(Position(2, 5, ended=True))
    assert not acceptance.lacks(header("delta", 3, 9))
    assert not acceptance.lacks(header("usage", 3, 9))
    assert acceptance.lacks(header("usage", 2, 9))
    acceptance.join(2)
    assert acceptance.offer(header("restarted", 2, 8)) is Verdict.ENDED
    assert acceptance.offer(header("usage", 2, 9)) is Verdict.ACCEPTED
    assert acceptance.ended


def test_an_acknowledgement_of_a_copy_stored_too_early_does_not_count() -> None:
    log, writer = Log(), Writer(0, ["delta", "delta", TERMINAL])
    writer.look(log, restart=False)
    writer.open(log)
    for _ in range(3):
        writer.send()
    writer.deliver(log, 0, lose=True, lose_ack=False)
    for _ in range(2):
        writer.deliver(log, 0, lose=False, lose_ack=False)
    writer.go_back(reconnect=True)
    writer.deliver(log, 1, lose=False, lose_ack=False)
    for _ in range(2):
        writer.deliver(log, 1, lose=True, lose_ack=False)
    while writer.pending:
        writer.hear(0)
    assert len(log.entries) == 4, "every event has been stored and acknowledged once"
    assert accepted(log.entries) == writer.events[:2]
    assert writer.base == 2, "so what readers have dropped is still to be repeated"
    writer.finish(log)
    assert accepted(log.entries) == writer.events
