"""Draw the schedule of a run from a seed. Pure."""

import random
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

__all__ = [
    "DELIVERIES",
    "KINDS",
    "LEASE",
    "PRODUCERS",
    "SERVICES",
    "BILLINGS",
    "Ask",
    "Cancel",
    "Ending",
    "Export",
    "Fault",
    "FaultKind",
    "Protocol",
    "Schedule",
    "Shape",
    "Watch",
    "Worker",
    "draw",
    "shape_of",
]

LEASE: Final = 3.0
"""Seconds of a producer's lease in these runs, after which the queue redelivers its request."""
PRODUCERS: Final = ("producer-0", "producer-1")
DELIVERIES: Final = ("delivery-0", "delivery-1")
BILLINGS: Final = ("billing-0", "billing-1")
SERVICES: Final = (*PRODUCERS, *DELIVERIES, *BILLINGS)
NODES: Final = "nodes"
ROLLED: Final = "delivery"
"""The target of a rolling restart: all replicas of delivery, one after the other."""
ROLL_SECONDS: Final = 9.0
LONG_TOKENS: Final = 600
LONG_SIZE: Final = 10_000
"""Tokens, and characters per token, of an answer too large for the buffers between delivery and a client."""
STUCK_SECONDS: Final = 6.0

Ending = Literal["end", "cut", "error"]
Protocol = Literal["sse", "ndjson", "websocket", "grpc"]
FaultKind = Literal["kill", "pause", "drain", "cut", "hold", "slow", "outage", "roll"]

KINDS: Final[dict[FaultKind, float]] = {
    "kill": 3.0,
    "pause": 3.0,
    "drain": 1.5,
    "cut": 2.0,
    "hold": 2.5,
    "slow": 1.5,
    "outage": 0.4,
}
"""Relative weight of each kind."""

PROTOCOLS: Final[dict[Protocol, float]] = {"sse": 4.0, "ndjson": 1.0, "websocket": 3.0, "grpc": 2.0}
CONSUMERS: Final = 2


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a generation ``at`` seconds from the start.

    ``key`` identifies it at the provider, and is the idempotency key. ``rate``: tokens per second, ``None`` for all at
    once. ``ending``: how the provider's stream ends. ``refusals``: number of calls that the provider refuses before.
    ``restart``: whether it is requested again when its producer is lost. ``grace``: seconds without a subscriber after
    which it is cancelled. ``size``: least characters per token.
    """

    at: float
    key: str
    session: str
    tokens: int
    rate: float | None = None
    ending: Ending = "end"
    refusals: int = 0
    restart: bool = False
    grace: float | None = None
    replica: int = 0
    size: int = 0

    @property
    def seconds(self) -> float:
        """Return the provider's streaming time in seconds."""
        return self.tokens / self.rate if self.rate else 0.5


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """A subscriber that connects ``at`` seconds from the start, or once its request is accepted, if that is later.

    ``ask``: index of that request. ``scope``: its generation alone, its session from that request's cursor on, or its
    session from the beginning. ``stays``: seconds until each connection is dropped, except the last one. ``window``:
    its flow control window in events, if the protocol has one; ``None``: no bound. ``stuck``: seconds for which it does
    not read from its first connection.
    """

    at: float
    ask: int
    scope: Literal["generation", "session", "start"]
    stays: tuple[float, ...] = ()
    replicas: tuple[int, ...] = (0,)
    protocol: Protocol = "sse"
    window: int | None = None
    stuck: float = 0.0


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A service that reads the durable consumer ``consumer`` from ``at`` on, and shares its events with other workers.

    ``stays``: seconds of each of its connections. ``forgets``: the share of events that it does not acknowledge at
    their first delivery. It continues until all events are acknowledged.
    """

    at: float
    consumer: str
    stays: tuple[float, ...] = ()
    replicas: tuple[int, ...] = (0,)
    forgets: float = 0.0


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """The provider's later export of the usage of request ``ask``."""

    at: float
    ask: int
    input: int
    output: int


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """A cancellation of request ``ask``."""

    at: float
    ask: int
    replica: int = 0


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault ``at`` seconds from the start that is healed ``seconds`` later.

    ``kill``: SIGKILL. ``pause``: SIGSTOP. ``drain``: SIGTERM. ``roll``: SIGTERM of one process after the other, each
    when the previous one is ready again, without a time limit. ``cut``: connections break and new ones are refused.
    ``hold``: sent data arrives when the fault is over. ``slow``: every read is delayed. ``outage``: SIGKILL of all
    nodes. ``node``: index of the node that a service loses; ``None`` for all.
    """

    number: int
    at: float
    seconds: float
    kind: FaultKind
    target: str
    node: int | None = None


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Density of a run. ``asks`` and ``faults``: per second; ``nodes``: of the broker; ``kinds``: of fault, with
    weights; ``targets``: names that faults are limited to. ``rolls``: whether there is a rolling restart.
    """

    nodes: int = 3
    asks: float = 1.2
    faults: float = 0.8
    sessions: int = 5
    restarts: float = 0.5
    kinds: dict[FaultKind, float] = msgspec.field(default_factory=lambda: dict(KINDS))
    targets: tuple[str, ...] = ()
    rolls: bool = True


def shape_of(nodes: int, kinds: Sequence[FaultKind] = (), targets: Sequence[str] = ()) -> Shape:
    """Return the shape with only these kinds of fault and these targets, which may be prefixes of names.

    Raises:
        ValueError: a name is unknown, or none of these faults applies to any of these targets.
    """
    known = (*SERVICES, *(f"node-{n}" for n in range(nodes)))
    for target in targets:
        if not any(name.startswith(target) for name in known):
            raise ValueError(f"target {target!r} is unknown: use one of {', '.join(known)}")
    names = tuple(name for name in known if name.startswith(tuple(targets))) if targets else ()
    weights = {kind: weight for kind, weight in KINDS.items() if kind in (kinds or KINDS) and _befalls(kind, names)}
    rolls = "roll" in (kinds or ("roll",)) and (not names or any(name in DELIVERIES for name in names))
    if not weights and not rolls:
        raise ValueError(f"no fault of {', '.join(kinds)} applies to {', '.join(names)}")
    return Shape(nodes=nodes, kinds=weights, targets=names, rolls=rolls)


def _befalls(kind: FaultKind, names: Sequence[str]) -> bool:
    """Return whether a kind of fault applies to any of the targets; only services have links."""
    if not names:
        return True
    nodes = [name.startswith("node-") for name in names]
    return any(nodes) if kind == "outage" else kind not in ("cut", "hold", "slow") or not all(nodes)


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """The schedule of a run. ``tokens``: validity of credentials in seconds; ``None``: none are required."""

    seed: int
    seconds: float
    nodes: int
    asks: tuple[Ask, ...]
    watches: tuple[Watch, ...]
    cancels: tuple[Cancel, ...]
    faults: tuple[Fault, ...]
    workers: tuple[Worker, ...] = ()
    exports: tuple[Export, ...] = ()
    tokens: float | None = None


def draw(seed: int, seconds: float, shape: Shape | None = None) -> Schedule:
    """Return the schedule of a seed. All faults are healed 2 s before ``seconds``."""
    rng, shape = random.Random(seed), shape or Shape()
    asks = _asks(rng, seconds, shape)
    watches = tuple(watch for index, ask in enumerate(asks) for watch in _watches(rng, index, ask))
    ways, more = random.Random(f"{seed}: ways"), random.Random(f"{seed}: more")
    long = _long(more, seconds)
    return Schedule(
        seed=seed,
        seconds=seconds,
        nodes=shape.nodes,
        asks=(*asks, long),
        watches=(*(_on_a_way(ways, watch) for watch in watches), *_stuck(more, len(asks), long)),
        cancels=tuple(
            Cancel(at=_round(ask.at + rng.uniform(0, 1.2 * ask.seconds)), ask=index, replica=rng.randrange(2))
            for index, ask in enumerate(asks)
            if rng.random() < 0.15
        ),
        faults=_with_roll(more, _faults(rng, seconds, shape), seconds, shape),
        workers=tuple(_worker(ways, f"c{n // 2}", seconds) for n in range(2 * CONSUMERS)),
        exports=tuple(
            Export(
                at=_round(ask.at + ways.uniform(0, 3 * ask.seconds)),
                ask=index,
                input=ways.randint(0, 500),
                output=ways.randint(0, 500),
            )
            for index, ask in enumerate(asks)
            if ways.random() < 0.2
        ),
        tokens=ways.choice((None, 6.0, 12.0)),
    )


def _long(rng: random.Random, seconds: float) -> Ask:
    """Return a request for an answer larger than the buffers."""
    at = _round(rng.uniform(0, 0.3 * seconds))
    return Ask(
        at=at,
        key="long",
        session="long",
        tokens=LONG_TOKENS,
        rate=60.0,
        restart=True,
        replica=rng.randrange(2),
        size=LONG_SIZE,
    )


def _stuck(rng: random.Random, index: int, ask: Ask) -> tuple[Watch, ...]:
    """Return its subscribers: one that reads at once, and some that do not read until they are evicted."""
    patient = Watch(at=ask.at, ask=index, scope="generation", replicas=(rng.randrange(2),))
    late = [
        Watch(
            at=_round(ask.at + rng.uniform(0.8, 1.3) * ask.seconds),
            ask=index,
            scope="start",
            replicas=(rng.randrange(2),),
            stuck=STUCK_SECONDS,
        )
        for _ in range(2)
    ]
    return patient, *late


def _with_roll(rng: random.Random, faults: tuple[Fault, ...], seconds: float, shape: Shape) -> tuple[Fault, ...]:
    """Add a rolling restart to the faults if there is time for one, without other faults of deliveries meanwhile."""
    if not shape.rolls or seconds < 2 * ROLL_SECONDS or (shape.targets and not set(shape.targets) & set(DELIVERIES)):
        return faults
    begin = _round(rng.uniform(2.0, seconds - ROLL_SECONDS - 2.0))
    end = begin + ROLL_SECONDS
    kept = [f for f in faults if f.target not in DELIVERIES or f.at + f.seconds + _rest(f) < begin or f.at > end + 3.0]
    roll = Fault(number=len(faults), at=begin, seconds=ROLL_SECONDS, kind="roll", target=ROLLED)
    return tuple(sorted([*kept, roll], key=lambda fault: fault.at))


def _on_a_way(rng: random.Random, watch: Watch) -> Watch:
    protocol = rng.choices(list(PROTOCOLS), list(PROTOCOLS.values()))[0]
    window = rng.choice((None, 1, 3, 20)) if protocol in ("websocket", "grpc") else None
    return msgspec.structs.replace(watch, protocol=protocol, window=window)


def _worker(rng: random.Random, consumer: str, seconds: float) -> Worker:
    drops = rng.choice((1, 3, 6))
    return Worker(
        at=_round(rng.uniform(0, 0.4 * seconds)),
        consumer=consumer,
        stays=tuple(_round(rng.uniform(0.5, seconds / (drops + 1))) for _ in range(drops)),
        replicas=tuple(rng.randrange(2) for _ in range(drops + 1)),
        forgets=rng.choice((0.0, 0.05)),
    )


def _asks(rng: random.Random, seconds: float, shape: Shape) -> tuple[Ask, ...]:
    count = max(3, round(seconds * shape.asks))
    times = sorted(rng.uniform(0, 0.85 * seconds) for _ in range(count))
    return tuple(
        Ask(
            at=_round(at),
            key=f"k{index}",
            session=f"s{rng.randrange(shape.sessions)}",
            tokens=rng.randint(20, 400),
            rate=rng.choice((None, 20.0, 40.0, 60.0, 100.0)),
            ending=rng.choices(("end", "cut", "error"), (14, 1, 1))[0],
            refusals=rng.choices((0, 1, 2), (14, 1, 1))[0],
            restart=rng.random() < shape.restarts,
            grace=rng.choice((None, None, None, None, 2.0)),
            replica=rng.randrange(2),
        )
        for index, at in enumerate(times)
    )


def _watches(rng: random.Random, index: int, ask: Ask) -> list[Watch]:
    found: list[Watch] = []
    for _ in range(rng.choices((1, 2, 3), (4, 3, 1))[0]):
        drops = rng.choice((0, 1, 2, 4, 8))
        found.append(
            Watch(
                at=_round(ask.at + rng.choice((0.0, rng.uniform(0, 1.5 * ask.seconds)))),
                ask=index,
                scope=rng.choices(("generation", "session", "start"), (6, 3, 1))[0],
                stays=tuple(_round(rng.choice((0.05, rng.uniform(0.2, 4.0)))) for _ in range(drops)),
                replicas=tuple(rng.randrange(2) for _ in range(drops + 1)),
            )
        )
    return found


def _faults(rng: random.Random, seconds: float, shape: Shape) -> tuple[Fault, ...]:
    if not shape.kinds:
        return ()
    healed = seconds - 2.0
    free: dict[str, float] = {}  # time until which a target, or all nodes together, gets no fault
    found: list[Fault] = []
    at = rng.uniform(1.0, 2.0)
    while at < healed - 1.0:
        fault = _fault(rng, len(found), _round(at), shape, healed)
        key = NODES if fault.target.startswith("node") else fault.target
        if free.get(key, 0.0) <= at:
            found.append(fault)
            free[key] = fault.at + fault.seconds + _rest(fault)
            at += rng.expovariate(shape.faults)
        else:
            at += 0.25
    return tuple(found)


def _fault(rng: random.Random, number: int, at: float, shape: Shape, healed: float) -> Fault:
    kind = rng.choices(list(shape.kinds), list(shape.kinds.values()))[0]
    seconds = min(_lasting(rng, kind), healed - at)
    if kind == "outage":
        return Fault(number=number, at=at, seconds=_round(seconds), kind=kind, target=NODES)
    names = shape.targets or (*PRODUCERS, *PRODUCERS, *SERVICES, *(f"node-{n}" for n in range(shape.nodes)))
    nodes_too = kind in ("kill", "pause", "drain")
    target = rng.choice([name for name in names if nodes_too or not name.startswith("node-")])
    node = None if nodes_too or rng.random() < 0.6 else rng.randrange(shape.nodes)
    return Fault(number=number, at=at, seconds=_round(seconds), kind=kind, target=target, node=node)


def _lasting(rng: random.Random, kind: FaultKind) -> float:
    """Return the duration of a fault; pauses and held connections often exceed the lease."""
    match kind:
        case "pause" | "hold":
            return rng.choice((rng.uniform(0.3, 2.0), rng.uniform(LEASE + 0.3, LEASE + 3.0)))
        case "kill" | "drain" | "outage":
            return rng.uniform(0.1, 3.0)
        case _:
            return rng.uniform(0.5, 5.0)


def _rest(fault: Fault) -> float:
    """Return the recovery time of a target, before another fault has an effect."""
    if fault.target.startswith("node"):
        return 6.0
    return 3.0 if fault.kind in ("kill", "drain") else 1.0


def _round(value: float) -> float:
    return round(value, 3)
