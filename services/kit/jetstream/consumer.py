"""Durable consumers on the broker: made, looked at, paused and removed while services run."""

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
    "tailrace_consumers_reset_total", "Consumers made anew because their position was beyond their stream", ["consumer"]
)

NUDGE_SECONDS: Final = 0.5
_FOR_EVER: Final = "9999-12-31T23:59:59Z"


class Place(msgspec.Struct, frozen=True):
    """A position: in the consumer's own deliveries, and in the stream."""

    consumer_seq: int = 0
    stream_seq: int = 0


class DurableInfo(msgspec.Struct, frozen=True):
    """A consumer now.

    ``config``: as the broker has it. ``created``: its incarnation and time of birth, by the broker's clock.
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
        """When a pause ends (RFC 3339); ``None`` where it lasts until it is ended, or there is none."""
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
    """An answer of which nothing is needed but that it is none of a refusal."""


class Durables:
    """The consumers of streams. Every method raises `BrokerUnavailable` when the broker does not answer."""

    def __init__(self, broker: Requester) -> None:
        self._broker = broker

    async def create(self, stream: str, config: dict[str, Any]) -> DurableInfo:
        """Create a consumer; one that exists in just this way is returned as it is.

        Raises:
            APIError: it exists otherwise, a setting is wrong, or there are too many.
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
        """Return a consumer; ``None`` when there is none."""
        return await self._find(f"CONSUMER.INFO.{stream}.{name}", DurableInfo)

    async def reset(self, spec: ConsumerSpec, after: int = 0) -> None:
        """Make one of the topology's consumers anew, to deliver what its stream keeps behind ``after``.

        Raises:
            APIError: the broker refuses a setting.
        """
        config = consumer_config(spec)
        if after > 0:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
        await self.delete(spec.stream, spec.durable)
        await self.create(spec.stream, config)
        RESET.labels(spec.durable).inc()
        log.error("consumer made anew", stream=spec.stream, consumer=spec.durable, after=after)

    async def mend(self, spec: ConsumerSpec) -> None:
        """Make one of the topology's consumers anew that is missing, or whose position is beyond its stream's end.

        What the stream keeps is delivered again: for readers to whom repeats do no harm, and for work queues, which
        keep only what is not done. In a cluster nothing is done, for a leader may lag: there no server alone loses what
        was acknowledged.

        Raises:
            APIError: the broker refuses a setting.
        """
        info = await self.info(spec.stream, spec.durable)
        stream = await self._ask(f"STREAM.INFO.{spec.stream}", _Stream)
        if stream.config.num_replicas == 1 and (info is None or info.delivered.stream_seq > stream.state.last_seq):
            await self.reset(spec)

    async def delete(self, stream: str, name: str) -> bool:
        """Remove a consumer; tell whether there was one."""
        return await self._find(f"CONSUMER.DELETE.{stream}.{name}", _Done) is not None

    async def pause(self, stream: str, name: str, until: str | None) -> bool:
        """Deliver nothing until a time (RFC 3339), or until `resume`; tell whether there is such a consumer."""
        query = {"pause_until": until or _FOR_EVER}
        return await self._find(f"CONSUMER.PAUSE.{stream}.{name}", _Done, query) is not None

    async def resume(self, stream: str, name: str) -> bool:
        """Deliver again; tell whether there is such a consumer."""
        known = await self._find(f"CONSUMER.PAUSE.{stream}.{name}", _Done, {}) is not None
        # The broker looks at the pulls that wait since before only when another one comes; this one can get nothing.
        query = msgspec.json.encode({"batch": 1, "no_wait": True, "max_bytes": 1})
        with suppress(BrokerUnavailable):
            await self._broker.request(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", query, timeout=NUDGE_SECONDS)
        return known

    async def all_of(self, stream: str) -> list[DurableInfo]:
        """Return all consumers of a stream (the broker allows 1,000 by default); none where there is no stream."""
        found: list[DurableInfo] = []
        while True:
            page = await self._find(f"CONSUMER.LIST.{stream}", _Page, {"offset": len(found)})
            if page is None:
                return found
            found += page.consumers or []
            if not page.consumers or len(found) >= page.total:
                return found

    async def _find(self, operation: str, type_: type[T], query: Any = None) -> T | None:
        """Return the answer; ``None`` for what is missing."""
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
