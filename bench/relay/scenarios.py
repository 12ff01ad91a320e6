"""Scenarios of a run: number, rate and length of the streams, and each stream's request to the provider."""

from typing import Final

import msgspec

__all__ = ["SCENARIOS", "Plan", "Scenario", "StreamOrder", "Targets"]


class Targets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Expected results on two cores. Latencies in milliseconds, added to a direct connection.

    ``stored_…``: for the target ``producer``, without readers and billing; the others are for the whole pipeline.
    """

    added_p50_ms: float | None = None
    added_p99_ms: float | None = None
    cpu_ms_per_1000: float | None = None
    tokens_per_s: float | None = None
    stored_tokens_per_s: float | None = None
    stored_events_per_s: float | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario. ``rate``: tokens per second and stream; ``None``: as fast as the reader accepts them."""

    name: str
    about: str
    generations: int
    tokens: int
    rate: float | None
    subscribers: int = 1
    targets: Targets = Targets()

    @property
    def produced(self) -> int:
        """Return the total number of tokens that the provider sends."""
        return self.generations * self.tokens

    @property
    def seconds(self) -> float:
        """Return the time limit of streaming, after which the run is aborted."""
        paced = self.tokens / self.rate if self.rate else 0.0
        return 30.0 + 2 * paced + self.produced / 20_000


class StreamOrder(msgspec.Struct, frozen=True):
    """One stream as the provider is asked for it; travels as the text of the user's message.

    ``phase``: seconds from the common begin to the first token. ``cell``: index of the first token's stamp.
    """

    stream: int
    tokens: int
    rate: float | None
    phase: float
    cell: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The task of one client process. ``deadline``: seconds from its start; ``first``: its first stream's number.

    It creates the files ``ready`` when all its streams are open, ``ended`` when the last one has ended, if work remains
    then, and ``result``.
    """

    kind: str
    host: str
    port: int
    model: str
    headers: dict[str, str]
    run: str
    first: int
    generations: int
    total: int
    tokens: int
    rate: float | None
    subscribers: int
    deadline: float
    stamps: str
    latencies: str
    ready: str
    ended: str
    result: str

    def orders(self) -> list[StreamOrder]:
        """Return the streams of this client, phases spread evenly over one interval of all streams."""
        step = 1 / self.rate / self.total if self.rate else 0.0
        numbers = range(self.first, self.first + self.generations)
        return [StreamOrder(n, self.tokens, self.rate, n * step, n * self.tokens) for n in numbers]


SCENARIOS: Final = {
    s.name: s
    for s in (
        Scenario(name="smoke", about="does everything work", generations=5, tokens=40, rate=40.0),
        Scenario(
            name="paced-200",
            about="200 generations at a model's usual pace",
            generations=200,
            tokens=200,
            rate=20.0,
            targets=Targets(added_p50_ms=1.5, added_p99_ms=10.0, cpu_ms_per_1000=250.0),
        ),
        Scenario(
            name="paced-200x2",
            about="the same, two subscribers each",
            generations=200,
            tokens=200,
            rate=20.0,
            subscribers=2,
        ),
        Scenario(
            name="paced-800",
            about="800 generations at the same pace",
            generations=800,
            tokens=200,
            rate=20.0,
            targets=Targets(added_p99_ms=200.0, cpu_ms_per_1000=150.0),
        ),
        Scenario(
            name="flat-20",
            about="20 streams as fast as the provider sends",
            generations=20,
            tokens=20_000,
            rate=None,
            targets=Targets(tokens_per_s=100_000.0, stored_tokens_per_s=200_000.0),
        ),
        Scenario(
            name="flat-200",
            about="200 streams as fast as the provider sends",
            generations=200,
            tokens=4_000,
            rate=None,
            targets=Targets(stored_tokens_per_s=200_000.0),
        ),
        Scenario(
            name="events-20",
            about="20 streams so fast and yet so even that nearly every token is an event of its own",
            generations=20,
            tokens=10_000,
            rate=1_000.0,
            targets=Targets(stored_events_per_s=15_000.0),
        ),
        Scenario(
            name="events-200",
            about="the same tokens per second, of 200 streams",
            generations=200,
            tokens=1_000,
            rate=100.0,
            targets=Targets(stored_events_per_s=15_000.0),
        ),
    )
}
