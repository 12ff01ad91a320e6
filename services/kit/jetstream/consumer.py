"""Durable consumers on the broker: create, inspect, pause and remove them while services run."""

from contextlib import suppress
from typing import Any, Final, TypeVar

import msgspec
import structlog
from prometheus_client import Counter

from schemas.topology import ConsumerSpec
from services.kit.jetstream import api
from services.kit.jetstream.admin import consumer_config
from services.kit.jetstream.api import Requester
from services.kit.jetstream.errors import APIError, BrokerUnavailable

__all__ = ["DurableInfo", "Durables", "Place"]

log = structlog.get_logger()
T = TypeVar("T")
RESET: Final = Counter(
    "tailrace_consumers_reset_total", "Consumers recreated because their position was beyond their stream", ["consumer"]
)

NUDGE_SECONDS: Final = 0.5
_FOR_EVER: Final = "9999-12-31T23:59:59Z"


class Place(msgspec.Struct, frozen=True):
    """A position: in the consumer's own deliveries, and in the stream."""

    consumer_seq: int = 0
    stream_seq: int = 0


class DurableInfo(msgspec.Struct, frozen=True):
    """The current state of a consumer.

    ``config``: as on the broker. ``created``: its incarnation and creation time, by the broker's clock.
    ``num_pending``: messages never delivered yet; ``num_ack_pending``: delivered and not acknowledged;
    ``num_redelivered``: of those, delivered more than once.
    """

    stream_name: str
    name: str
    created: str
    config: dict[str, Any]
    delivered: Place = Place()
    ack_floor: Place = Place()
    num_ack_pending: int = 0
    num_redelivered: int = 0
    num_waiting: int = 0
    num_pending: int = 0
    paused: bool = False

    @property
    def pause_until(self) -> str | None:
        """Return the end of a pause (RFC 3339); ``None`` for an unlimited pause, or without one."""
        until = self.config.get("pause_until")
        return str(until) if self.paused and until and until != _FOR_EVER else None


class _Page(msgspec.Struct):
    consumers: list[DurableInfo] | None = None
    total: int = 0


class _Stream(msgspec.Struct):
    class _State(msgspec.Struct):
        last_seq: int

    class _Config(msgspec.Struct):
        num_replicas: int = 1

    state: _State
    config: _Config


class _Done(msgspec.Struct):
    """An answer whose only content of interest is that it is not a refusal."""


class Durables:
    """Manage the consumers of streams. Every method raises `BrokerUnavailable` when the broker does not answer."""

    def __init__(self, broker: Requester) -> None:
        self._broker = broker

    async def create(self, stream: str, config: dict[str, Any]) -> DurableInfo:
        """Create a consumer; an existing one with the same settings is returned unchanged.

        Raises:
            APIError: it exists with other settings, a setting is wrong, or there are too many.
        """
        return await self._set(stream, config, "create")

    async def update(self, stream: str, config: dict[str, Any]) -> DurableInfo:
        """Change a consumer's settings; its position stays.

        Raises:
            APIError: there is none, or a setting cannot be changed.
        """
        return await self._set(stream, config, "update")

    async def _set(self, stream: str, config: dict[str, Any], action: str) -> DurableInfo:
        name = config["durable_name"]
        query = {"stream_name": stream, "config": config, "action": action}
        return await self._ask(f"CONSUMER.CREATE.{stream}.{name}", DurableInfo, query)

    async def info(self, stream: str, name: str) -> DurableInfo | None:
        """Return a consumer's state, or None if it does not exist."""
        return await self._find(f"CONSUMER.INFO.{stream}.{name}", DurableInfo)

    async def reset(self, spec: ConsumerSpec, after: int = 0) -> None:
        """Recreate a consumer of the topology, to deliver the messages after stream sequence ``after``.

        Raises:
            APIError: the broker refuses a setting.
        """
        config = consumer_config(spec)
        if after > 0:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
        await self.delete(spec.stream, spec.durable)
        await self.create(spec.stream, config)
        RESET.labels(spec.durable).inc()
        log.error("consumer recreated", stream=spec.stream, consumer=spec.durable, after=after)

    async def mend(self, spec: ConsumerSpec) -> None:
        """Recreate a consumer of the topology that is missing, or whose position is beyond its stream's end.

        The stored messages are delivered again: only for readers that tolerate repeats, and for work queues, which keep
        only unfinished work. In a cluster nothing is done, because a leader may lag: no single server loses
        acknowledged data there.

        Raises:
            APIError: the broker refuses a setting.
        """
        info = await self.info(spec.stream, spec.durable)
        stream = await self._ask(f"STREAM.INFO.{spec.stream}", _Stream)
        if stream.config.num_replicas == 1 and (info is None or info.delivered.stream_seq > stream.state.last_seq):
            await self.reset(spec)

    async def delete(self, stream: str, name: str) -> bool:
        """Delete a consumer; return whether it existed."""
        return await self._find(f"CONSUMER.DELETE.{stream}.{name}", _Done) is not None

    async def pause(self, stream: str, name: str, until: str | None) -> bool:
        """Pause deliveries until a time (RFC 3339), or until `resume`; return whether the consumer exists."""
        query = {"pause_until": until or _FOR_EVER}
        return await self._find(f"CONSUMER.PAUSE.{stream}.{name}", _Done, query) is not None

    async def resume(self, stream: str, name: str) -> bool:
        """Resume deliveries; return whether the consumer exists."""
        known = await self._find(f"CONSUMER.PAUSE.{stream}.{name}", _Done, {}) is not None
        # The broker serves older waiting pulls only when another pull arrives; this one can get no message itself.
        query = msgspec.json.encode({"batch": 1, "no_wait": True, "max_bytes": 1})
        with suppress(BrokerUnavailable):
            await self._broker.request(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", query, timeout=NUDGE_SECONDS)
        return known

    async def all_of(self, stream: str) -> list[DurableInfo]:
        """Return all consumers of a stream (the broker allows 1,000 by default); none if it does not exist."""
        found: list[DurableInfo] = []
        while True:
            page = await self._find(f"CONSUMER.LIST.{stream}", _Page, {"offset": len(found)})
            if page is None:
                return found
            found += page.consumers or []
            if not page.consumers or len(found) >= page.total:
                return found

    async def _find(self, operation: str, type_: type[T], query: Any = None) -> T | None:
        """Return the answer; ``None`` for a missing object."""
        try:
            return await self._ask(operation, type_, query)
        except APIError as error:
            if error.code == 404:
                return None
            raise

    async def _ask(self, operation: str, type_: type[T], query: Any = None) -> T:
        try:
            return await api.ask(self._broker, operation, type_, query)
        except APIError as error:
            if error.is_temporary:
                raise BrokerUnavailable(f"{operation}: {error}") from error
            raise
