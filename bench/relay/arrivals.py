"""Open-loop load: when answers are asked for, how long they are, and which clients drop or cancel.

Starts arrive as a Poisson process whatever the pipeline does, so a slow answer delays no later start, and latencies are
taken from the time a start was due (no coordinated omission).
"""

import math
import random
from typing import Final

import msgspec

from bench.relay.scenarios import StreamOrder

__all__ = ["OPEN_SCENARIOS", "OpenPlan", "OpenScenario", "Start", "schedule"]


class OpenScenario(msgspec.Struct, frozen=True, kw_only=True):
    """Load of one run.

    ``starts``: arrivals per second for ``seconds``; or ``together``: starts at the same moment; or ``workers``: clients
    that each start the next answer when their last one has ended (a closed loop). Answers have a lognormal number of
    tokens (``median``, ``sigma``, between 10 and 800) or ``tokens``, at ``rate`` tokens per second. ``drops`` and
    ``cancels``: shares of the clients.
    """

    name: str
    about: str
    starts: float = 0.0
    together: int = 0
    workers: int = 0
    seconds: float = 30.0
    rate: float = 20.0
    tokens: int | None = None
    median: float = 150.0
    sigma: float = 0.7
    drops: float = 0.1
    cancels: float = 0.05


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. ``at``: seconds from the begin. ``drop_at``, ``cancel_at``: tokens after which the client does so.

    ``away``: seconds that a client that dropped stays away.
    """

    at: float
    order: StreamOrder
    drop_at: int = 0
    away: float = 0.0
    cancel_at: int = 0


class OpenPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process does. It makes the file ``ready``, waits for ``go``, and writes ``result`` in the end.

    ``kind``: as of an endpoint. ``resumes``: whether clients may drop and resume. ``workers``: run the starts one after
    another in so many loops instead of at their times.
    """

    kind: str
    host: str
    port: int
    model: str
    headers: dict[str, str]
    run: str
    starts: list[Start]
    resumes: bool
    workers: int
    seconds: float
    deadline: float
    stamps: str
    ready: str
    go: str
    result: str


def schedule(scenario: OpenScenario, seed: int) -> list[Start]:
    """Return the starts of a run, the same for the same seed."""
    rng = random.Random(seed)
    starts: list[Start] = []
    at, cell = 0.0, 0
    while True:
        if scenario.starts:
            at += rng.expovariate(scenario.starts)
            if at > scenario.seconds:
                return starts
        elif len(starts) >= (scenario.together or scenario.workers * math.ceil(scenario.seconds * 1_000)):
            return starts
        drawn = round(rng.lognormvariate(math.log(scenario.median), scenario.sigma))
        tokens = scenario.tokens or min(max(drawn, 10), 800)
        fate, token = rng.random(), rng.randint(1, max(1, tokens - 5))
        drops, cancels = fate < scenario.drops, scenario.drops <= fate < scenario.drops + scenario.cancels
        starts.append(
            Start(
                at=at,
                order=StreamOrder(len(starts), tokens, scenario.rate, 0.0, cell),
                drop_at=token if drops else 0,
                away=rng.uniform(0.1, 2.0),
                cancel_at=token if cancels else 0,
            )
        )
        cell += tokens
        if scenario.workers and len(starts) >= 20_000:
            return starts


_OPEN = "Poisson arrivals, lognormal lengths at 20 tokens/s"
OPEN_SCENARIOS: Final = {
    s.name: s
    for s in (
        OpenScenario(
            name="open-smoke", about="does the open loop work", starts=4.0, seconds=3.0, rate=60.0, median=30.0
        ),
        OpenScenario(
            name="single", about="one at a time", workers=1, seconds=10, tokens=20, rate=200, drops=0, cancels=0
        ),
        OpenScenario(name="open-5", about=f"5 starts/s: {_OPEN}", starts=5.0),
        OpenScenario(name="open-20", about=f"20 starts/s: {_OPEN}", starts=20.0),
        OpenScenario(name="open-20-fast", about="the same at 60 tokens/s", starts=20.0, rate=60.0),
        OpenScenario(name="open-40", about=f"40 starts/s: {_OPEN}", starts=40.0),
        OpenScenario(name="open-100", about=f"100 starts/s: {_OPEN}", starts=100.0),
        OpenScenario(name="together-100", about="100 starts at the same moment", together=100, drops=0, cancels=0),
        OpenScenario(
            name="starts",
            about="answers of one token, 100 clients",
            workers=100,
            seconds=10,
            tokens=1,
            drops=0,
            cancels=0,
        ),
    )
}
