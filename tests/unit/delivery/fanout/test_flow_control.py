"""Test the events in flight to a client, its window, and its rate limit."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.delivery.fanout.flow_control import (
    CREDIT_HIGH,
    RECORDS,
    AutoWindow,
    CreditCount,
    FlowControl,
    InFlight,
)
from services.delivery.formats.frames import UNLIMITED
from services.delivery.websocket.token_bucket import TokenBucket
from services.kit.problem import Problem

LOW, START, HIGH = 16_384, 65_536, 1_048_576


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.integers(1, 5_000)), max_size=60))
def test_sent_events_are_either_in_flight_or_released(steps: list[tuple[bool, int, int]]) -> None:
    flight = InFlight()
    sent_events = sent_size = released_events = released_size = place = 0
    for now, (is_ack, events, size) in enumerate(steps):
        if is_ack:
            released = flight.acked(place - events, float(now))
            if released is not None:
                released_events += released.events
                released_size += released.size
                assert released.trip >= 0
        else:
            place += events
            sent_events += events
            sent_size += size
            flight.sent(place, events, size, float(now))
        assert flight.size == sent_size - released_size
    last = flight.acked(place, 1e6)
    if last is not None:
        released_events += last.events
    assert released_events == sent_events
    assert flight.size == 0


def test_repeated_and_older_acknowledgements_release_nothing() -> None:
    flight = InFlight()
    flight.sent(5, 1, 100, 0.0)
    assert flight.acked(4, 1.0) is None
    assert flight.acked(5, 1.0) is not None
    assert flight.acked(5, 2.0) is None
    assert flight.acked(3, 2.0) is None


def test_records_of_unacknowledged_writes_are_bounded() -> None:
    flight = InFlight()
    for place in range(1, 3 * RECORDS):
        flight.sent(place, 1, 10, float(place))
    assert len(flight._sent) == RECORDS
    assert flight.acked(3 * RECORDS, 1e6) is not None
    assert flight.size == 0


def run(capacity: float, trip: float, seconds: float, demand: float = 1e12) -> AutoWindow:
    """Simulate a client with a round trip of ``trip`` seconds that reads ``capacity`` bytes per second."""
    window, flight = AutoWindow(LOW, HIGH, START), InFlight()
    step, now, place, dealt, said = trip / 50, 0.0, 0, 0.0, 0.0
    arriving: list[tuple[float, int, int]] = []  # when the client has it, up to which place, bytes
    queue: list[tuple[int, int]] = []
    acks: list[tuple[float, int]] = []
    while now < seconds:
        said = min(said + demand * step, 1e12)
        room = window.size - flight.size
        size = int(min(room, said, 8_192))
        while size >= 512:
            place += 1
            said -= size
            flight.sent(place, 1, size, now, filled=window.is_filled(flight.size + size))
            arriving.append((now + trip / 2, place, size))
            size = int(min(window.size - flight.size, said, 8_192))
        while arriving and arriving[0][0] <= now:
            queue.append(arriving.pop(0)[1:])
        dealt = min(dealt + capacity * step, max(capacity * step, 8_192.0))
        while queue and queue[0][1] <= dealt:
            done, size = queue.pop(0)
            dealt -= size
            acks.append((now + trip / 2, done))
        while acks and acks[0][0] <= now:
            released = flight.acked(acks.pop(0)[1], now)
            assert released is not None
            window.measured(released)
        now += step
    return window


@pytest.mark.parametrize(("capacity", "trip"), [(2e6, 0.1), (1e6, 0.2), (4e6, 0.05)])
def test_window_grows_to_the_bandwidth_delay_product_of_the_client(capacity: float, trip: float) -> None:
    needed = capacity * trip
    window = run(capacity, trip, 40 * trip)
    assert needed <= window.size <= 4 * needed
    assert needed <= run(capacity, trip, 30.0).size <= 4 * needed  # also after the trip was measured anew


def test_window_stays_within_its_bounds() -> None:
    assert run(1e9, 0.1, 3.0).size == HIGH
    assert run(10_000, 0.1, 3.0).size >= LOW


def test_window_of_a_session_with_few_events_keeps_its_size() -> None:
    assert run(1e9, 0.1, 4.0, demand=20_000).size == START


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=200))
def test_pace_never_allows_more_than_burst_and_rate(pauses: list[float]) -> None:
    pace, now = TokenBucket(10.0, 20.0, 0.0), 0.0
    for taken, pause in enumerate(pauses, 1):
        now += pause
        now += pace.take(1.0, now)
        assert taken <= 20.0 + 10.0 * now + 1e-6


class Limited:
    """A subscriber that only remembers its limits."""

    room = space = -1

    def limit(self, room: int, space: int) -> None:
        self.room, self.space = room, space


def flow(events: int | None = None, size: int | None = None, *, auto: bool = False) -> tuple[FlowControl, Limited]:
    made, subscriber = FlowControl(lambda: 1.0, events, size, auto=auto), Limited()
    made.join(subscriber)  # type: ignore[arg-type]
    return made, subscriber


def test_no_credit_is_no_limit_and_cannot_be_added_to() -> None:
    made, subscriber = flow(0, None)
    assert (subscriber.room, subscriber.space) == (UNLIMITED, UNLIMITED)
    with pytest.raises(Problem) as refused:
        made.grant(1, 1)
    assert refused.value.status == 409


def test_credit_granted_and_acknowledged_adds_up() -> None:
    made, subscriber = flow(2, 100)
    made.sent(5, 2, 40)
    subscriber.room, subscriber.space = 0, 60
    made.grant(3, None)
    assert (subscriber.room, subscriber.space) == (3, 60)
    made.acked(5)
    assert (subscriber.room, subscriber.space) == (5, 100)


def test_an_acknowledgement_ahead_of_what_was_sent_is_refused() -> None:
    made, _ = flow(2)
    made.sent(5, 1, 10)
    with pytest.raises(Problem) as refused:
        made.acked(6)
    assert refused.value.status == 409


def test_credit_before_a_subscriber_joins_is_kept() -> None:
    made, subscriber = FlowControl(lambda: 1.0, 1, None, auto=False), Limited()
    made.grant(4, 0)
    made.join(subscriber)  # type: ignore[arg-type]
    assert (subscriber.room, subscriber.space) == (5, UNLIMITED)


def test_credit_and_a_window_exclude_each_other() -> None:
    with pytest.raises(Problem) as refused:
        flow(1, auto=True)
    assert refused.value.status == 400


def test_credit_never_grows_beyond_its_bound() -> None:
    made, subscriber = flow(CREDIT_HIGH, 1)
    made.grant(CREDIT_HIGH, CREDIT_HIGH)
    assert (subscriber.room, subscriber.space) == (CREDIT_HIGH, CREDIT_HIGH)


async def test_waiting_for_credit_ends_with_a_grant_a_close_or_in_time() -> None:
    credit = CreditCount(0)
    assert not await credit.wait(0.01)
    asyncio.get_running_loop().call_later(0.01, credit.grant, 3)
    assert await credit.wait(5)
    credit.take(3)
    asyncio.get_running_loop().call_later(0.01, credit.close)
    assert not await credit.wait(5)
