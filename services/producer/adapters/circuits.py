"""Circuit breakers, shared by all producers: one for each provider's connections, one for each of its models.

A state change is stored in the registry bucket, and the changes of other producers are adopted from there, so that one
producer's outage is known to all. Only circuits with failures are kept, so invented model names cost nothing.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Final, NamedTuple

import msgspec
import structlog

from schemas.topology import REGISTRY_BUCKET
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.bucket import Bucket
from services.kit.tasks import BackgroundTasks
from services.producer import metrics
from services.producer.core.circuit import Circuit, CircuitState
from services.producer.core.parts import UpstreamFailure

__all__ = ["COUNTED", "Circuits", "Permit"]

log = structlog.get_logger()
_PREFIX: Final = "circuit."
_STATES: Final[dict[CircuitState, int]] = {"closed": 0, "half-open": 1, "open": 2}
_REOPEN_WATCH: Final = 1.0
WATCH_SECONDS: Final = 60.0  # a silently dead watch is detected after this time
SLOTS: Final = 256
"""Keys of a provider's models in the bucket; of two models that share a key, the newer change is kept."""
MODEL_LIMIT: Final = 120
"""Characters of a model's name in a log line."""
KEPT: Final = 1_000
"""Bound of circuits with failures in one process."""
FORGOTTEN: Final = 10
"""A circuit is closed when no call has tried it for this many times its open time."""
COUNTED: Final = frozenset(
    {
        "upstream_overloaded",
        "upstream_error",
        "upstream_unreachable",
        "upstream_cut_off",
        "deadline_connect",
        "deadline_first_token",
    }
)
"""Failures that show an outage. A malformed answer, a rate limit or a refusal does not."""


class _Key(NamedTuple):
    """The key of a circuit; ``model`` is ``None`` for the provider's connections."""

    provider: str
    model: str | None


class _Shared(msgspec.Struct, omit_defaults=True):
    """A shared circuit. ``by``: the process that changed it; ``blocked``: end of the block by tenant."""

    by: str
    provider: str
    model: str | None = None
    blocked: dict[str, float] = {}
    for_all: bool = False


class Permit:
    """An admitted call, which reports its outcome to the circuits."""

    def __init__(self, circuits: "Circuits", provider: str, model: str, tenant: str) -> None:
        self._circuits = circuits
        self._connection = _Key(provider, None)
        self._model = _Key(provider, model)
        self._tenant = tenant

    def connected(self) -> None:
        """Report that the provider has begun to answer."""
        self._circuits.note(self._connection, lambda circuit, _now: circuit.succeed())

    def succeeded(self) -> None:
        """Report the first token."""
        self._circuits.note(self._model, lambda circuit, _now: circuit.succeed())

    def failed(self, failure: UpstreamFailure, *, connected: bool) -> None:
        """Report a failure before the first token that the caller did not cause. ``connected``: after connecting."""
        if failure.code not in COUNTED:
            self.left()
        elif connected:
            self._circuits.note(self._model, lambda circuit, now: circuit.fail(self._tenant, now, self), creating=True)
        else:  # no caller can cause that, so it counts for all tenants
            self._circuits.note(self._connection, lambda circuit, now: circuit.fail("", now, self), creating=True)
        self.left()

    def left(self) -> None:
        """Report the end of the call without an outcome."""
        for key in (self._connection, self._model):
            circuit = self._circuits.known(key)
            if circuit is not None:
                circuit.leave(self)


class Circuits:
    """The circuits of all upstreams in this process.

    After ``threshold`` failures in a row a circuit opens; ``seconds`` later one call at a time may try again.
    """

    def __init__(self, broker: Broker, threshold: int, seconds: float) -> None:
        self._broker = broker
        self._threshold = threshold
        self._seconds = seconds
        self._name = secrets.token_hex(8)
        self._circuits: dict[_Key, Circuit] = {}  # with failures only, the oldest first; bounded by KEPT
        self._tasks = BackgroundTasks()  # one for each change under way

    def is_open(self, provider: str, model: str, tenant: str) -> bool:
        """Return whether no call may be made now, without taking a permit."""
        now = time.time()
        keys = ((_Key(provider, None), ""), (_Key(provider, model), tenant))
        return any(
            (c := self.known(key)) is not None and c.state(tenant_of_key, now) == "open" for key, tenant_of_key in keys
        )

    def admit(self, provider: str, model: str, tenant: str) -> Permit | None:
        """Return the permit for a call, or ``None`` if a circuit is open, or half open with a call under way."""
        permit, now = Permit(self, provider, model, tenant), time.time()
        for key, tenant_of_key in ((_Key(provider, None), ""), (_Key(provider, model), tenant)):
            circuit = self.known(key)
            if circuit is not None and not circuit.admits(tenant_of_key, now, permit):
                permit.left()
                return None
        metrics.CIRCUIT.labels(provider)  # present from the first call on
        if self._circuits:
            self._measure(provider)
        return permit

    def known(self, key: _Key) -> Circuit | None:
        """Return a circuit that has had failures, or ``None``."""
        return self._circuits.get(key)

    def note(self, key: _Key, change: Callable[[Circuit, float], bool], *, creating: bool = False) -> None:
        """Change a circuit, and share it with the other producers if its state has changed."""
        circuit = self._circuits.get(key)
        if circuit is None:
            if not creating:
                return
            self._make_room()
            circuit = self._circuits[key] = Circuit(self._threshold, self._seconds)
        changed = change(circuit, time.time())
        if circuit.is_closed and not circuit.failures:
            del self._circuits[key]
        if changed:
            log.warning(
                "circuit changed",
                provider=key.provider,
                model=None if key.model is None else key.model[:MODEL_LIMIT],
                state="closed" if circuit.is_closed else "open" if circuit.for_all else "open for one tenant",
            )
            self._measure(key.provider)
            self._share(_Shared(self._name, *key, dict(circuit.blocked), circuit.for_all))

    async def follow(self) -> None:
        """Adopt the changes of other producers, until cancelled."""
        while True:
            try:
                bucket = await self._broker.bucket(REGISTRY_BUCKET)
                await self._watch(bucket)
            except BrokerUnavailable as error:
                log.debug("circuits not followed", error=str(error))
            self._forget()
            await asyncio.sleep(_REOPEN_WATCH)

    async def _watch(self, bucket: Bucket) -> None:
        async with aclosing(bucket.watch(_PREFIX + ">", WATCH_SECONDS)) as entries:
            async for entry in entries:
                self._take_over(entry.value)

    def _take_over(self, value: bytes) -> None:
        try:
            shared = msgspec.json.decode(value, type=_Shared)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        now = time.time()
        key = _Key(shared.provider, shared.model)
        live = {tenant: until for tenant, until in shared.blocked.items() if now < until}
        if shared.by == self._name or (shared.blocked and not live):
            return
        circuit = self._circuits.get(key)
        if not live and (circuit is None or circuit.is_closed):
            return
        if circuit is None:
            self._make_room()
            circuit = self._circuits[key] = Circuit(self._threshold, self._seconds)
        if live:
            circuit.adopt(live, for_all=shared.for_all, now=now)
        else:
            del self._circuits[key]
        self._measure(key.provider)
        model = None if key.model is None else key.model[:MODEL_LIMIT]
        log.info("circuit changed by another producer", provider=key.provider, model=model, blocked=len(live))

    def _make_room(self) -> None:
        """Drop one circuit at the bound: the oldest closed one, else the oldest."""
        if len(self._circuits) >= KEPT:
            oldest = next((k for k, c in self._circuits.items() if c.is_closed), next(iter(self._circuits)))
            del self._circuits[oldest]

    def _forget(self) -> None:
        """Drop circuits that no call has tried for `FORGOTTEN` times their open time."""
        expired = time.time() - FORGOTTEN * self._seconds
        for key, circuit in list(self._circuits.items()):
            if circuit.blocked and max(circuit.blocked.values()) < expired:
                del self._circuits[key]
                self._measure(key.provider)

    def _measure(self, provider: str) -> None:
        connection = self.known(_Key(provider, None))
        state: CircuitState = "closed" if connection is None else connection.state("", time.time())
        metrics.CIRCUIT.labels(provider).set(_STATES[state])
        models = sum(
            key.provider == provider and key.model is not None and not circuit.is_closed
            for key, circuit in self._circuits.items()
        )
        metrics.MODEL_CIRCUITS.labels(provider).set(models)

    def _share(self, shared: _Shared) -> None:
        self._tasks.start(self._store(shared), name="circuit-share")

    async def _store(self, shared: _Shared) -> None:
        try:
            bucket = await self._broker.bucket(REGISTRY_BUCKET)
            await bucket.put(_bucket_key(shared), msgspec.json.encode(shared))
        except BrokerUnavailable as error:
            log.debug("circuit not shared", provider=shared.provider, error=str(error))


def _bucket_key(shared: _Shared) -> str:
    if shared.model is None:
        return f"{_PREFIX}connection.{shared.provider}"
    slot = int.from_bytes(hashlib.sha256(shared.model.encode(errors="replace")).digest()[:4]) % SLOTS
    return f"{_PREFIX}model.{shared.provider}.{slot}"
