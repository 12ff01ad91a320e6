"""Durable consumers without a broker: verdicts that do not depend on the delivery, tokens, and settings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import Header
from schemas.cursor import CursorIssuer
from services.delivery.consumers.definition import (
    AGAIN,
    ConsumerSpec,
    Definition,
    definition_of,
    durable_config,
    first_position,
    later_position,
    seconds,
)
from services.delivery.consumers.pulling import envelope
from services.delivery.consumers.session import Delivery
from services.delivery.consumers.source import Raw, Source
from services.delivery.consumers.tokens import InvalidToken, Token
from services.delivery.consumers.verdicts import REMEMBERED, Track
from services.delivery.http.consumer_events import parse_pull_options
from services.kit.jetstream.consumer import DurableInfo
from services.kit.problem import Problem

TYPES = ["delta", "delta", "delta", "restarted", "completed", "usage"]
HEADERS = st.builds(
    lambda type_, epoch, seq: Header("g", seq, type_, epoch),
    st.sampled_from(TYPES),
    st.integers(1, 3),
    st.integers(0, 6),
)


def straight(log: list[Header | None]) -> list[bool]:
    """Return the verdicts of the acceptance rule for a log read once from its beginning."""
    position, said = BEGINNING, []
    for header in log:
        verdict = Verdict.GAP
        if header is not None:
            position, verdict = judge(position, header.type, header.epoch, header.seq)
        said.append(verdict is Verdict.ACCEPTED)
    return said


@given(st.lists(st.one_of(st.none(), HEADERS), max_size=30).map(lambda log: [Header("g", 0, "started", 1), *log]))
def test_a_track_has_the_verdict_of_the_acceptance_rule_for_every_message(log: list[Header | None]) -> None:
    track = Track()
    for seq, header in enumerate(log, 1):
        track.apply(seq, header)
        track.apply(seq, header)  # judged by two readers at once
    said = [track.verdict(seq) == "accepted" for seq in range(1, len(log) + 1)]
    assert said == straight(log)
    assert track.verdict(len(log) + 1) is None


def test_a_track_bounds_its_dropped_messages_and_has_no_verdict_before_its_base() -> None:
    track = Track()
    track.apply(1, Header("g", 0, "started", 1))
    for seq in range(2, REMEMBERED + 102):
        track.apply(seq, Header("g", 0, "started", 1))
    assert len(track.dropped) == REMEMBERED
    assert track.verdict(1) is None
    assert track.verdict(track.base) is None
    assert track.verdict(track.base + 1) == "duplicate"


def test_a_generation_without_its_beginning_is_joined_at_the_highest_kept_epoch() -> None:
    track = Track()
    first = Header("g", 5, "delta", 1)
    assert track.acceptance.lacks(first)
    track.acceptance.join(2)
    assert not track.acceptance.lacks(first)
    for seq, header in enumerate([first, Header("g", 6, "restarted", 2), Header("g", 7, "delta", 1)], 11):
        track.apply(seq, header)
    assert [track.verdict(seq) for seq in (11, 12, 13)] == ["zombie", "accepted", "zombie"]
    assert track.acceptance.gap_before(12) == "beginning_expired"


@given(
    st.one_of(st.just(AGAIN), st.integers(0, 255)),
    st.integers(1, 2**40),
    st.integers(1, 2**40),
    st.integers(1, 1_000_000),
)
def test_a_token_round_trips(partition: int, seq: int, consumer_seq: int, deliveries: int) -> None:
    token = Token(partition, "0123abcd", seq, consumer_seq, deliveries)
    assert Token.parse(token.text()) == token


@given(st.text(max_size=80))
def test_other_text_is_no_token(text: str) -> None:
    with pytest.raises(InvalidToken):
        Token.parse("k2" + text)


@given(st.text(alphabet="0123456789abcdefgain", min_size=10, max_size=60).map(lambda t: "k1" + t))
def test_any_parsed_token_names_only_the_given_consumer(text: str) -> None:
    try:
        subject = Token.parse(text).subject("svc-1-a-b")
    except InvalidToken:
        return
    root, ack, stream, durable, *numbers = subject.split(".")
    assert (root, ack, durable) == ("$JS", "ACK", "svc-1-a-b")
    assert stream == "CONSUMERS" or stream.removeprefix("TOKENS_").isdecimal()
    assert all(number.isdecimal() for number in numbers)


def test_a_definition_round_trips_through_the_metadata_of_the_durable_consumer() -> None:
    definition = Definition(spec=ConsumerSpec(session="s", types=("completed",)), revision=3)
    config = durable_config("t", "n", definition, 2, 4, 60.0)
    assert config["filter_subject"] == "tokens.2.t.s.*"
    assert config["max_ack_pending"] == 250
    assert config["inactive_threshold"] == 60_000_000_000
    info = DurableInfo("TOKENS_2", config["name"], "2026-01-01T00:00:00Z", config)
    assert definition_of(info) == definition
    assert definition_of(DurableInfo("TOKENS_2", "x", "", {"metadata": {"tailrace.consumer": "nonsense"}})) is None


@pytest.mark.parametrize(("wanted", "partitions", "share"), [(1, 1, 1), (1, 4, 1), (10, 4, 3), (1_000, 1, 1_000)])
def test_partitions_share_the_in_flight_limit(wanted: int, partitions: int, share: int) -> None:
    config = durable_config("t", "n", Definition(spec=ConsumerSpec(max_in_flight=wanted)), 0, partitions, 0)
    assert config["max_ack_pending"] == share
    assert "inactive_threshold" not in config


def test_a_partition_added_later_is_read_from_the_start_of_the_consumer() -> None:
    born = "2026-01-01T00:00:00Z"
    cursor = CursorIssuer(1, born, "t", "s").issue(41)
    assert first_position(ConsumerSpec(), 0) == {"deliver_policy": "all"}
    assert first_position(ConsumerSpec(start="new"), 0) == {"deliver_policy": "new"}
    assert later_position(ConsumerSpec(start="new"), 0, born, "2026-02-02T00:00:00Z") == {
        "deliver_policy": "by_start_time",
        "opt_start_time": "2026-02-02T00:00:00Z",
    }
    after = ConsumerSpec(session="s", after=cursor)
    assert later_position(after, 1, born, born) == {"deliver_policy": "by_start_sequence", "opt_start_seq": 42}
    assert later_position(after, 1, "2026-03-03T00:00:00Z", born) == {"deliver_policy": "all"}
    assert first_position(after, 0) == {"deliver_policy": "all"}
    since = first_position(ConsumerSpec(since=0.5), 0)
    assert since == {"deliver_policy": "by_start_time", "opt_start_time": "1970-01-01T00:00:00.500000Z"}


def test_the_brokers_times_are_read_to_the_second_and_beyond() -> None:
    assert seconds("1970-01-01T00:00:02Z") == 2
    assert seconds("2026-11-21T14:14:27.506974684Z") > seconds("2026-11-21T14:14:27Z")
    assert seconds("2026-11-21T14:14:27.5Z") == pytest.approx(seconds("2026-11-21T14:14:27.506974684Z"), abs=0.01)


def source() -> Source:
    broker: Any = None
    return Source(broker, 0, "TOKENS_0", "svc-1-t-n", lambda: None)


def raw(seq: int, consumer_seq: int, deliveries: int = 1) -> Raw:
    return Raw(seq, consumer_seq, deliveries, "tokens.0.t.s.g", b"", "")


def test_a_single_reader_has_no_holes() -> None:
    reader = source()
    assert [reader.seen(raw(10 + n, 1 + n)) for n in range(3)] == [9, 9, 9]
    assert reader.seen(raw(11, 4, deliveries=2)) == 10
    assert reader.seen(raw(13, 5)) == 9


def test_a_message_delivered_to_another_reader_is_a_hole() -> None:
    reader = source()
    reader.seen(raw(10, 1))
    assert reader.seen(raw(13, 3)) == 12
    assert reader.seen(raw(14, 4)) == 12
    reader.seen(raw(10, 6, deliveries=2))
    assert reader.seen(raw(16, 7)) == 15


def test_an_envelope_contains_the_stored_bytes() -> None:
    stored = b'{"type":"delta","seq":1,  "text":"x"}'
    delivery = Delivery("k1", "s", "t1", 2, "delta", stored, "reply", "beginning_expired")
    assert stored in envelope(delivery, auto=False)
    assert b'"token":"k1"' in envelope(delivery, auto=False)
    assert b"token" not in envelope(delivery, auto=True)


def scope(query: str = "", accept: str = "") -> dict[str, Any]:
    return {"query_string": query.encode(), "headers": [(b"accept", accept.encode())]}


def test_a_query_selects_a_batch_or_a_stream() -> None:
    assert parse_pull_options(scope()) == (False, False, None, 0.0)
    assert parse_pull_options(scope("ack=auto", "application/x-ndjson")) == (True, True, None, 0.0)
    assert parse_pull_options(scope("batch=10&wait=2.5")) == (False, False, 10, 2.5)
    with pytest.raises(Problem):
        parse_pull_options({"query_string": b"\xff=1", "headers": []})
