"""Circuit breakers, one for each upstream, shared by all producers through the broker.

purgatory keeps the states; a change here is stored in the registry bucket, and a change elsewhere is taken over from
there, so that a fleet does not learn the same outage one by one.
"""

import asyncio
import time
from typing import Any, Final, Literal

import msgspec
import nats.errors
import structlog
from nats.js.kv import KeyValue
from purgatory.domain.model import Context, OpenedState

from schemas.topology import REGISTRY_BUCKET
from services.kit.broker import Broker
from services.kit.nats_client import heeding
from services.producer import metrics
from services.producer.core.parts import UpstreamFailure

__all__ = ["Circuits"]

log = structlog.get_logger()
_PREFIX: Final = "circuit."
_STATES: Final = {"closed": 0, "half-opened": 1, "opened": 2}
_REOPEN_WATCH: Final = 1.0
WATCH_SECONDS: Final = 60.0  # a watch that has died without a word is noticed after so long
COUNTED: Final = frozenset(
    {
        "upstream_overloaded",
        "upstream_error",
        "upstream_unreachable",
        "upstream_cut_off",
        "upstream_malformed",
        "deadline_connect",
        "deadline_first_token",
    }
)
"""Failures that speak of an outage. A rate limit or a refused request does not: the upstream works."""


class _Shared(msgspec.Struct):
    """A circuit's state as producers tell it each other; ``opened_at`` in seconds since 1970."""

    state: Literal["closed", "half-opened", "opened"]
    opened_at: float | None = None


class Circuits:
    """States of all upstreams as this process knows them.

    After ``threshold`` failures in a row a circuit opens; ``ttl`` seconds later one call may try again.
    """

    def __init__(self, broker: Broker, threshold: int, ttl: float) -> None:
        self._broker = broker
        self._threshold = threshold
        self._ttl = ttl
        self._contexts: dict[str, Context] = {}  # one for each provider
        self._trying: set[str] = set()  # half-open, with a call under way
        self._tasks: set[asyncio.Task[None]] = set()

    def is_open(self, provider: str) -> bool:
        """Tell whether no call may be made now, without asking for one."""
        context = self._context(provider)
        return context.state == "opened" and time.time() <= (context.opened_at or 0.0) + self._ttl

    def admits(self, provider: str) -> bool:
        """Tell whether a call may be made now; in the half-open state one at a time."""
        context = self._context(provider)
        try:
            context.handle_new_request()
        except OpenedState:
            return False
        self._told(provider)
        if context.state != "half-opened":
            return True
        if provider in self._trying:
            return False
        self._trying.add(provider)
        return True

    def succeeded(self, provider: str) -> None:
        """A call has brought its first token."""
        self._trying.discard(provider)
        self._context(provider).handle_end_request()
        self._told(provider)

    def failed(self, provider: str, failure: UpstreamFailure) -> None:
        """A call has failed before its first token."""
        self._trying.discard(provider)
        if failure.code in COUNTED:
            self._context(provider).handle_exception(ConnectionError(failure.code))
            self._told(provider)

    def abandoned(self, provider: str) -> None:
        """A call was ended by our side before it could tell anything."""
        self._trying.discard(provider)

    async def follow(self) -> None:
        """Take over what other producers found out; runs until cancelled."""
        while True:
            try:
                bucket = await self._broker.bucket(REGISTRY_BUCKET)
                await self._watch(bucket)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.debug("circuits are not followed now", error=repr(error))
            await asyncio.sleep(_REOPEN_WATCH)

    async def _watch(self, bucket: KeyValue) -> None:
        watcher: Any = await bucket.watch(_PREFIX + ">", include_history=False)
        try:
            while True:
                entry = await heeding(watcher.updates(timeout=WATCH_SECONDS))
                if entry is not None and entry.value:
                    self._take_over(entry.key.removeprefix(_PREFIX), entry.value)
        finally:
            await watcher.stop()

    def _take_over(self, provider: str, value: bytes) -> None:
        try:
            shared = msgspec.json.decode(value, type=_Shared)
        except msgspec.DecodeError:
            return
        context = self._context(provider)
        if shared.state in (context.state, "half-opened"):
            return
        self._contexts[provider] = Context(
            provider, self._threshold, self._ttl, state=shared.state, opened_at=shared.opened_at
        )
        metrics.CIRCUIT.labels(provider).set(_STATES[shared.state])
        log.info("circuit changed elsewhere", provider=provider, state=shared.state)

    def _context(self, provider: str) -> Context:
        context = self._contexts.get(provider)
        if context is None:
            context = self._contexts[provider] = Context(provider, self._threshold, self._ttl)
            metrics.CIRCUIT.labels(provider).set(0)
        return context

    def _told(self, provider: str) -> None:
        """Tell the others if the state has changed."""
        context = self._contexts[provider]
        changed = any(type(message).__name__ == "ContextChanged" for message in context.messages)
        context.messages.clear()
        if not changed:
            return
        log.warning("circuit changed", provider=provider, state=context.state)
        metrics.CIRCUIT.labels(provider).set(_STATES[context.state])
        task = asyncio.create_task(self._store(provider, _Shared(context.state, context.opened_at)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _store(self, provider: str, shared: _Shared) -> None:
        try:
            bucket = await self._broker.bucket(REGISTRY_BUCKET)
            await bucket.put(_PREFIX + provider.replace(" ", "_"), msgspec.json.encode(shared))
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.debug("circuit not shared", provider=provider, error=repr(error))
