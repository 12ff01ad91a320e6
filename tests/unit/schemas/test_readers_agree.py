"""Test that all readers give the same verdicts on the same log, with lost heads and any behaviour of writers."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import httpx_sse
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.acceptance import Acceptance
from schemas.codec import encode_event
from schemas.events import (
    TERMINAL_TYPES,
    Cancelled,
    Completed,
    Delta,
    Event,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Started,
    UsageReported,
)
from schemas.subjects import Address, parse_address, token_subject
from schemas.usage import Usage
from services.billing.core.fold import fold, joins_late
from services.billing.core.generation import Generation
from services.billing.core.intake import read_record
from services.delivery.consumers.judging import Judge
from services.delivery.log.read_cache import ReadCache
from services.delivery.log.reader import LogReader
from services.delivery.requests.generations import Lookups
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Stored
from services.kit.jetstream.kept import highest_kept_epoch
from services.producer.relay import read_begun
from services.standalone.follow import _judge, _Session
from tests.support.log_model import Entry, Log, Writer

ADDRESS = Address(0, "t", "s", "g")
SUBJECT = token_subject(ADDRESS)
STREAM = "TOKENS_0"
UNKNOWN = "of_a_later_version"
TAKEOVERS = {*TERMINAL_TYPES, "restarted"}


class Broker:
    """The part of a broker that readers use: the kept events of one generation, in batches."""

    def __init__(self, log: Sequence[Stored], batch: int = 3) -> None:
        self.log = list(log)
        self._batch = batch

    def cut(self, up_to: int) -> None:
        """Let everything up to a stream sequence expire."""
        self.log = [stored for stored in self.log if stored.seq > up_to]

    async def read(
        self, stream: str, filter_: str, from_seq: int = 1, *, up_to: int | None = None
    ) -> AsyncIterator[list[Stored]]:
        found = [m for m in self.log if m.seq >= from_seq and (up_to is None or m.seq <= up_to)]
        for at in range(0, len(found), self._batch):
            yield found[at : at + self._batch]

    async def first(self, stream: str, filter_: str) -> Stored | None:
        return self.log[0] if self.log else None

    async def last(self, stream: str, filter_: str) -> Stored | None:
        return self.log[-1] if self.log else None


class Said(NamedTuple):
    """The events that a reader accepted, as (stream sequence, epoch, seq), and the terminal among them."""

    accepted: list[tuple[int, int, int]]
    terminal: str | None


def stored(entry: Entry, seq: int) -> Stored:
    fields = {"generation": "g", "seq": entry.seq, "epoch": entry.epoch}
    match entry.type:
        case "started":
            event: Event = Started(**fields, model="m", provider="p", upstream_model="u")
        case "delta":
            event = Delta(**fields, text=entry.content or "x", tokens=entry.seq)
        case "notice":
            event = Notice(**fields, code="upstream_retry")
        case "usage":
            event = UsageReported(**fields, usage=Usage(input=1, output=entry.seq))
        case "restarted":
            event = Restarted(**fields, reason="producer_lost")
        case "completed":
            event = Completed(**fields, finish_reason="stop")
        case "failed":
            event = Failed(**fields, code="upstream_cut_off")
        case "cancelled":
            event = Cancelled(**fields, reason="requested")
        case "interrupted":
            event = Interrupted(**fields, reason="producer_lost")
        case "garbage":
            return Stored(seq, SUBJECT, b"garbage")
        case _:
            return Stored(seq, SUBJECT, msgspec.json.encode({"type": entry.type} | fields))
    return Stored(seq, SUBJECT, encode_event(event))


def definition(log: Sequence[tuple[int, Entry]]) -> Said:
    """Return the accepted events by a definition over the whole kept log, written independently of `Acceptance`."""
    events = [(at, e) for at, e in log if e.type != "garbage"]
    chain: list[tuple[int, Entry]] = []
    if events and events[0][1].seq > 0:
        highest = max(e.epoch for _, e in events)
        events = events[next(i for i, (_, e) in enumerate(events) if e.epoch == highest) :]
        chain, events = [events[0]], events[1:]
    for at, entry in events:
        if follows([e for _, e in chain], entry):
            chain.append((at, entry))
    terminal = next((e.type for _, e in chain if e.type in TERMINAL_TYPES), None)
    return Said([(at, e.epoch, e.seq) for at, e in chain], terminal)


def follows(chain: list[Entry], entry: Entry) -> bool:
    if not chain:
        return entry.seq == 0
    last, ended = chain[-1], any(e.type in TERMINAL_TYPES for e in chain)
    if entry.seq != last.seq + 1:
        return False
    if entry.epoch == last.epoch:
        return not ended or entry.type == "usage"
    return entry.epoch > last.epoch and entry.type in TAKEOVERS and not ended


# Logs: of writers that keep their obligations, over an unkind network; and of anything at all.
TYPES = ["started", "delta", "notice", "usage", UNKNOWN, "garbage", *sorted(TAKEOVERS)]
ENTRIES = st.builds(Entry, st.sampled_from(TYPES), st.integers(1, 3), st.integers(0, 5), st.just(0))


def first_alone(entries: list[Entry]) -> list[Entry]:
    """Leave out first events behind later ones: a writer sends nothing before its first event is acknowledged."""
    return [e for i, e in enumerate(entries) if e.seq or not any(before.seq for before in entries[:i])]


ANYTHING = st.lists(ENTRIES, max_size=25).map(first_alone)


@st.composite
def of_writers(draw: st.DrawFn) -> list[Entry]:
    """Return a log of producers that take over, lose acknowledgements, repeat events, and resume as zombies."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    log, writers = Log(), []
    for name in range(draw(st.integers(1, 4))):
        script = [rng.choice(["delta", "delta", "delta", "notice", UNKNOWN]) for _ in range(rng.randint(0, 6))]
        writer = Writer(name, [*script, "usage", "completed", *["usage"] * rng.randint(0, 2)])
        writer.look(log, restart=rng.random() < 0.7)
        if writer.refused:
            break
        writer.open(log)
        writers.append(writer)
        for _ in range(rng.randint(0, 25)):
            one = rng.choice(writers)  # also one that was taken over
            match rng.randrange(4):
                case 0 | 1:
                    one.send()
                    one.deliver(log, -1, lose=rng.random() < 0.2, lose_ack=rng.random() < 0.3)
                case 2:
                    one.hear(rng.randrange(5))
                case _:
                    one.go_back(reconnect=rng.random() < 0.5)
    if rng.random() < 0.8:
        for writer in reversed(writers):  # the zombies wake up last
            writer.finish(log)
    entries = list(log.entries)
    for _ in range(rng.randint(0, 2)):
        entries.insert(rng.randint(0, len(entries)), Entry("garbage", 1, 0, 0))
    return entries


LOGS = st.one_of(of_writers(), ANYTHING)


@st.composite
def cut_logs(draw: st.DrawFn) -> list[tuple[int, Entry]]:
    """A log whose head has been cut off anywhere, with stream sequences."""
    entries = draw(LOGS)
    return list(enumerate(entries, 1))[draw(st.integers(0, len(entries))) :]


def log_reader(broker: Broker, *, shared: bool) -> LogReader:
    reads = ReadCache(broker) if shared else None  # type: ignore[arg-type]  # the part of it that is used
    return LogReader(broker, 0, "t", "s", reads)  # type: ignore[arg-type]


async def by_log_reader(log: list[Stored], start: int, *, shared: bool = False) -> list[tuple[int, str]]:
    """As feeds and replays read: from a place in the log, where nothing is known of the generation."""
    reader = log_reader(Broker(log), shared=shared)
    entries = [await reader.accept(message) for message in log if message.seq > start]
    return [(entry.seq, entry.gap) for entry in entries if entry is not None]


async def by_durable_consumer(log: list[Stored], rng: random.Random) -> list[int]:
    """As services read through a durable consumer: late, again, and out of order."""
    judge = Judge(Broker(log), limit=rng.choice([1, 100]))  # type: ignore[arg-type]
    accepted = set()
    for message in [*rng.choices(log, k=len(log)), *log] if log else []:
        judgement = await judge.judge(STREAM, "i", SUBJECT, message.seq, message.data, since=message.seq)
        if judgement.accepted:
            accepted.add(message.seq)
    return sorted(accepted)


async def by_billing(log: list[Stored], rng: random.Random) -> tuple[Generation | None, int]:
    """As billing reads: in batches, its position kept between them."""
    known: Generation | None = None
    accepted, at = 0, 0
    while at < len(log):
        batch = log[at : at + rng.randint(1, 6)]
        at += len(batch)
        records = [read_record(m.seq, m.subject, m.data) for m in batch]
        late = joins_late(known, records)
        highest = await highest_kept_epoch(Broker(log).read(STREAM, SUBJECT)) if late else 0
        folded = fold(known, ADDRESS, records, 0, highest)
        known = folded.generation or known
        accepted += sum(folded.verdicts[name] for name in ("accepted", "unknown", "malformed"))
        accepted -= sum(record.header is None for record in records)
    return known, accepted


def by_command_line(events: list[Stored]) -> list[int]:
    """Read as ``tailrace tail`` reads delivery's stream, here with each event twice."""
    session, accepted = _Session(), []
    for message in [each for event in events for each in (event, event)]:
        sse = httpx_sse.ServerSentEvent(event="message", data=message.data.decode(), id=str(message.seq))
        if _judge(sse, session) is not None:
            accepted.append(message.seq)
    return accepted


async def check(kept: list[tuple[int, Entry]], rng: random.Random) -> None:
    log = [stored(entry, seq) for seq, entry in kept]
    said = definition(kept)
    seqs = [seq for seq, _, _ in said.accepted]
    headless = bool(said.accepted) and said.accepted[0][2] > 0

    by_feed = await by_log_reader(log, 0)
    assert [seq for seq, _ in by_feed] == seqs
    gaps = ["beginning_expired" if headless else "", *[""] * (len(seqs) - 1)]
    assert [gap for _, gap in by_feed] == gaps[: len(seqs)]

    start = rng.choice([0, *(message.seq for message in log)])
    for shared in (False, True):
        read_on = await by_log_reader(log, start, shared=shared)
        assert [seq for seq, _ in read_on] == [seq for seq in seqs if seq > start]

    assert await by_durable_consumer(log, rng) == seqs

    broker = Broker(log)
    transcript = await Lookups(broker, SystemClock(), _first_partition).transcript("t", "s", "g")  # type: ignore[arg-type]
    terminal = msgspec.json.decode(msgspec.json.encode(transcript.terminal)) if transcript.terminal else {}
    assert (transcript.events, transcript.headless, terminal.get("type")) == (len(seqs), headless, said.terminal)

    begun = await read_begun(broker, STREAM, SUBJECT)  # type: ignore[arg-type]
    assert begun.position.ended == (said.terminal is not None)
    if said.accepted:
        assert begun.position[:2] == (said.accepted[-1][1], said.accepted[-1][2] + 1)
    assert begun.last_seq == (log[-1].seq if log else 0)

    row, accepted = await by_billing(log, rng)
    assert accepted == len(seqs)
    assert (row.state if row and row.ended else None) == said.terminal
    if row is not None:
        assert (row.position, row.headless) == (begun.position, headless)

    assert by_command_line([message for message in log if message.seq in seqs]) == seqs


async def _first_partition(_tenant: str, _session: str) -> int:
    return 0


@settings(deadline=None, max_examples=400)
@given(cut_logs(), st.integers(0, 2**32))
def test_every_reader_gives_the_same_verdicts_on_the_same_log(kept: list[tuple[int, Entry]], seed: int) -> None:
    asyncio.run(check(kept, random.Random(seed)))


ZOMBIE = [
    Entry("delta", 1, 2, 0),
    Entry("delta", 2, 3, 1),
    Entry("delta", 1, 3, 0),
    Entry("usage", 2, 4, 1),
    Entry("completed", 2, 5, 1),
]


def test_a_late_repeat_as_the_oldest_kept_event_is_accepted_by_no_reader() -> None:
    kept = list(enumerate(ZOMBIE, 40))
    assert definition(kept) == Said([(41, 2, 3), (43, 2, 4), (44, 2, 5)], "completed")
    asyncio.run(check(kept, random.Random(1)))


@settings(deadline=None, max_examples=300)
@given(of_writers(), st.data())
def test_readers_agree_where_events_expire_while_they_read(entries: list[Entry], data: st.DataObject) -> None:
    """A part expires after the first one was read, and all readers continue behind it; none repeats an event.

    Where nothing expired unread, the last event that was read is still there: without it a hole that a writer left just
    behind it, and will fill, looks like expired events to those who do not know where the log begins.
    """
    read = data.draw(st.integers(0, len(entries)))
    lost = data.draw(st.integers(read, len(entries)))
    asyncio.run(check_loss(list(enumerate(entries, 1)), read, lost))


async def check_loss(log: list[tuple[int, Entry]], read: int, lost: int) -> None:
    messages = [stored(entry, seq) for seq, entry in log]
    broker = Broker(messages)
    reader, judge = log_reader(broker, shared=False), Judge(broker)  # type: ignore[arg-type]
    by_feed = [entry for m in messages[:read] if (entry := await reader.accept(m)) is not None]
    for m in messages[:read]:
        await judge.judge(STREAM, "i", SUBJECT, m.seq, m.data, since=m.seq)
    records = [read_record(m.seq, m.subject, m.data) for m in messages]
    row = fold(None, ADDRESS, records[:read]).generation

    last_event = max((seq for seq, entry in log[:read] if entry.type != "garbage"), default=0)
    broker.cut(lost if lost > read else last_event - 1)
    if lost > read:
        await reader.join_again()
    behind = [entry for m in messages[lost:] if (entry := await reader.accept(m)) is not None]
    keys = [(e["epoch"], e["seq"]) for e in (_fields(entry.data) for entry in [*by_feed, *behind])]
    assert [seq for _, seq in keys] == sorted({seq for _, seq in keys}), "nothing is shown twice"
    holes = [i for i in range(1, len(keys)) if keys[i][1] != keys[i - 1][1] + 1]
    assert all(([*by_feed, *behind][i]).gap for i in holes), "no silent skip"

    highest = await highest_kept_epoch(broker.read(STREAM, SUBJECT))
    last = fold(row, ADDRESS, records[lost:], lost if lost > read else 0, highest).generation
    if by_feed or behind:
        assert last is not None
        assert (last.epoch, last.next_seq) == (keys[-1][0], keys[-1][1] + 1)
    judged = [await judge.judge(STREAM, "i", SUBJECT, m.seq, m.data, since=m.seq) for m in messages[lost:]]
    assert [(one.header.epoch, one.header.seq, one.gap) for one in judged if one.accepted and one.header] == [
        (*keys[len(by_feed) + i], entry.gap) for i, entry in enumerate(behind)
    ]


def _fields(data: bytes) -> dict[str, int]:
    return {"epoch": 1} | msgspec.json.decode(data)


def test_the_subject_of_the_tests_has_their_address() -> None:
    assert parse_address(SUBJECT) == ADDRESS
    assert Acceptance().position[:2] == (0, 0)
