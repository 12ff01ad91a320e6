"""Test the counts of sent events, without a broker."""

import asyncio

import pytest

from schemas.delivered import DeliveredReport, decode_delivered
from services.delivery.reports.reporter import IDLE_ROUNDS, DeliveryReporter, GenerationKey
from services.kit.jetstream.broker import BrokerUnavailable

PLACE = GenerationKey("default", "s", "g")


class Log:
    """A log that stores published messages and can be unavailable."""

    def __init__(self) -> None:
        self.reports: list[DeliveredReport] = []
        self.subjects: list[str] = []
        self.away = False

    async def publish(self, subject: str, data: bytes) -> int:
        if self.away:
            raise BrokerUnavailable("away")
        self.subjects.append(subject)
        self.reports.append(decode_delivered(data))
        return len(self.reports)


def numbers(report: DeliveredReport) -> tuple[int, ...]:
    return (report.number, report.subscribers, report.events, report.tokens, report.sent_tokens, report.bytes)


async def test_many_chunks_are_one_report_and_only_news_is_reported() -> None:
    log = Log()
    delivered = DeliveryReporter(log.publish, "replica")
    for reached in (10, 20, 15):
        delivered.add(PLACE, events=2, tokens=5, reached=reached, size=100, subscribers=reached == 10)
    await delivered.report()
    await delivered.report()
    assert (log.subjects, [numbers(r) for r in log.reports]) == (["delivered.default.s.g"], [(1, 1, 6, 20, 15, 300)])
    delivered.add(PLACE, events=1, size=1)
    await delivered.report()
    assert numbers(log.reports[-1]) == (2, 1, 7, 20, 15, 301)


async def test_without_a_broker_the_counts_wait() -> None:
    log = Log()
    delivered = DeliveryReporter(log.publish, "replica")
    delivered.add(PLACE, events=1)
    log.away = True
    await delivered.report()
    delivered.add(PLACE, events=1)
    log.away = False
    await delivered.report()
    assert [r.events for r in log.reports] == [2]


async def test_an_idle_counter_is_removed_and_a_new_one_starts_at_zero() -> None:
    log = Log()
    delivered = DeliveryReporter(log.publish, "replica")
    delivered.add(PLACE, events=1)
    for _round in range(IDLE_ROUNDS + 2):
        await delivered.report()
    assert len(delivered) == 0
    delivered.add(PLACE, events=4)
    await delivered.report()
    first, second = log.reports
    assert first.counter != second.counter
    assert (first.events, second.events) == (1, 4)


@pytest.mark.parametrize("away", [True, False])
async def test_counters_are_bounded(away: bool) -> None:
    log = Log()
    log.away = away
    delivered = DeliveryReporter(log.publish, "replica", limit=10)
    for number in range(30):
        delivered.add(GenerationKey("default", "s", f"g{number}"), events=1)
    await delivered.report()
    await delivered.report()
    assert len(delivered) <= 10
    assert len(log.reports) == (0 if away else 30)


async def test_the_last_counts_are_reported_when_it_stops() -> None:
    log, stop = Log(), asyncio.Event()
    delivered = DeliveryReporter(log.publish, "replica")
    running = asyncio.create_task(delivered.run(stop))
    delivered.add(PLACE, events=1)
    stop.set()
    await asyncio.wait_for(running, 10)
    assert len(log.reports) == 1
