"""Scenarios of a run: sessions, subscribers and pace, and the tasks of its processes."""

from typing import Final, Literal

import msgspec

__all__ = ["CROWDS", "SCENARIOS", "Kind", "Order", "Plan", "Scenario"]

Kind = Literal["live", "storm", "stuck", "replay"]


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario. ``rate``: events per second and session; ``None``: as fast as the log accepts them.

    ``events``: per session. ``history``: number of these in the log before the first subscription (``replay``: all).
    ``stuck``: additional subscribers that read nothing. ``feed_bytes``: delivery's bound of a session's events in
    memory, 0 for its default. ``within``: seconds in which a storm's clients return.
    """

    name: str
    about: str
    sessions: int = 1
    subscribers: int
    events: int
    rate: float | None
    kind: Kind = "live"
    history: int = 0
    stuck: int = 0
    feed_bytes: int = 0
    within: float = 2.0

    @property
    def streams(self) -> int:
        """Return the total number of subscribers."""
        return self.sessions * self.subscribers

    @property
    def deliveries(self) -> int:
        """Return the total number of events that the subscribers must receive."""
        return self.streams * (self.events - self.history if self.kind == "stuck" else self.events)

    @property
    def seconds(self) -> float:
        """Return the time limit, after which the run is aborted."""
        paced = (self.events - self.history) / self.rate if self.rate else 0.0
        return 60.0 + 2 * paced + self.deliveries / 20_000


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The task of the publisher: write the scenario's events to sessions ``base``, ``base`` + 1 …

    The events of ``history`` are written at once, the others when the file ``go`` appears. ``ends``: close every answer
    after its last event.
    """

    kind: Literal["log", "nchan"]
    port: int
    base: int
    sessions: int
    history: int
    events: int
    rate: float | None
    ends: bool
    deadline: float
    stamps: str
    go: str
    ready: str
    result: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The task of one client process: connections ``first`` to ``stop``; connection n reads session n modulo
    ``sessions``.

    ``samples``: every ``samples``-th connection checks every text and measures latencies; the others count. ``live``:
    skip the history. ``at_once``: number of connections opened at a time. Storms and replays begin when the file ``go``
    appears. ``deadline``: seconds from the start.
    """

    kind: Kind
    protocol: str
    port: int
    first: int
    stop: int
    base: int
    sessions: int
    events: int
    history: int
    live: bool
    samples: int
    within: float
    at_once: int
    deadline: float
    stamps: str
    latencies: str
    go: str
    ready: str
    result: str


CROWDS: Final = (1_000, 2_000, 5_000, 10_000)
_SECONDS: Final = 15


def _crowd(subscribers: int, rate: float) -> Scenario:
    return Scenario(
        name=f"live-{subscribers}x{rate:g}",
        about=f"1 session, {subscribers:,} subscribers, {rate:g} events/s",
        subscribers=subscribers,
        events=int(_SECONDS * rate),
        rate=rate,
    )


SCENARIOS: Final = {
    s.name: s
    for s in (
        Scenario(name="smoke", about="does everything work", sessions=2, subscribers=25, events=60, rate=30.0),
        *(_crowd(crowd, 20.0) for crowd in CROWDS),
        *(_crowd(crowd, 5.0) for crowd in CROWDS),
        Scenario(
            name="flat-1000",
            about="1 session, 1,000 subscribers, as fast as the log takes events",
            subscribers=1_000,
            events=3_000,
            rate=None,
        ),
        Scenario(
            name="sessions-1000x5",
            about="1,000 sessions, 5 subscribers each, 5 events/s each",
            sessions=1_000,
            subscribers=5,
            events=75,
            rate=5.0,
        ),
        Scenario(
            name="storm-5000",
            about="5,000 subscribers drop and return within 2 s, live at 5 events/s",
            subscribers=5_000,
            events=60,
            rate=5.0,
            kind="storm",
        ),
        Scenario(
            name="storm-log-5000",
            about="5,000 return within 2 s to places all over a log of which memory keeps little",
            subscribers=5_000,
            events=1_050,
            history=1_000,
            rate=5.0,
            kind="storm",
            feed_bytes=65_536,
        ),
        Scenario(
            name="replay-1000",
            about="1,000 finished sessions of 500 events read again, 100 at once",
            sessions=1_000,
            subscribers=1,
            events=500,
            history=500,
            rate=None,
            kind="replay",
        ),
        Scenario(
            name="stuck-100",
            about="1,000 subscribers at 20 events/s, without and with 100 that read nothing",
            subscribers=1_000,
            events=8_000 + int(_SECONDS * 20),
            history=8_000,  # requested by the stuck clients, so that they are stuck from the start
            rate=20.0,
            kind="stuck",
            stuck=100,
        ),
    )
}
