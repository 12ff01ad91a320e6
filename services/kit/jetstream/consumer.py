"""Durable consumers on the broker: made, looked at, paused and removed while services run."""

from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec
import structlog
from prometheus_client import Counter

from schemas.topology import ConsumerSpec
from services.kit.jetstream.admin import consumer_config
from services.kit.jetstream.connection import BrokerUnavailable

__all__ = ["DurableInfo", "DurableRefused", "Durables", "Place"]

log = structlog.get_logger()
RESET: Final = Counter(
    "tailrace_consumers_reset_total", "Consumers made anew because their position was beyond their stream", ["consumer"]
)

ASK_SECONDS: Final = 5.0
NUDGE_SECONDS: Final = 0.5
_TOO_MANY: Final = (10026, 10002)
_EXISTS: Final = (10148, 10013)
_MISSING: Final = (10149, 10014)
_WRONG_SETTING: Final = 10012
_FOR_EVER: Final = "9999-12-31T23:59:59Z"


class DurableRefused(Exception):
    """The broker will not do this to a consumer.

    ``too_many``: its bound of consumers for a stream is reached. ``exists``: one of this name exists already and
    is another one. ``missing``: there is none of this name.
    """

    def __init__(self, description: str, code: int) -> None:
        self.code = code
        self.too_many = code in _TOO_MANY
        self.exists = code in _EXISTS
        self.missing = code in _MISSING
        super().__init__(f"the broker refuses: {description} ({code})")


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


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Page(msgspec.Struct):
    consumers: list[DurableInfo] | None = None
    total: int = 0
    error: _Error | None = None


class _Stream(msgspec.Struct):
    class _State(msgspec.Struct):
        last_seq: int

    class _Config(msgspec.Struct):
        num_replicas: int = 1

    state: _State
    config: _Config


class _Failed(msgspec.Struct):
    error: _Error | None = None


class Asking(Protocol):
    """What of a connection is needed here."""

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> bytes | None:
        """Return the answer; ``None`` when nobody listens."""


class Durables:
    """The consumers of streams. Every method raises `BrokerUnavailable` when the broker does not answer."""

    def __init__(self, broker: Asking) -> None:
        self._broker = broker

    async def create(self, stream: str, config: dict[str, Any]) -> DurableInfo:
        """Create a consumer; one that exists in just this way is returned as it is.

        Raises:
            DurableRefused: it exists otherwise, a setting is wrong, or there are too many.
        """
        return await self._set(stream, config, "create")

    async def update(self, stream: str, config: dict[str, Any]) -> DurableInfo:
        """Change a consumer's settings; its position stays.

        Raises:
            DurableRefused: there is none, or a setting cannot be changed.
        """
        return await self._set(stream, config, "update")

    async def _set(self, stream: str, config: dict[str, Any], action: str) -> DurableInfo:
        name = config["durable_name"]
        query = {"stream_name": stream, "config": config, "action": action}
        data = await self._ask(f"$JS.API.CONSUMER.CREATE.{stream}.{name}", query)
        return msgspec.json.decode(data, type=DurableInfo)

    async def info(self, stream: str, name: str) -> DurableInfo | None:
        """Return a consumer; ``None`` when there is none."""
        data = await self._ask(f"$JS.API.CONSUMER.INFO.{stream}.{name}", missing_is_fine=True)
        return msgspec.json.decode(data, type=DurableInfo) if data else None

    async def reset(self, spec: ConsumerSpec, after: int = 0) -> None:
        """Make one of the topology's consumers anew, to deliver what its stream keeps behind ``after``.

        Raises:
            DurableRefused: the broker refuses a setting.
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
            DurableRefused: the broker refuses a setting.
        """
        info = await self.info(spec.stream, spec.durable)
        stream = msgspec.json.decode(await self._ask(f"$JS.API.STREAM.INFO.{spec.stream}"), type=_Stream)
        if stream.config.num_replicas == 1 and (info is None or info.delivered.stream_seq > stream.state.last_seq):
            await self.reset(spec)

    async def delete(self, stream: str, name: str) -> bool:
        """Remove a consumer; tell whether there was one."""
        return bool(await self._ask(f"$JS.API.CONSUMER.DELETE.{stream}.{name}", missing_is_fine=True))

    async def pause(self, stream: str, name: str, until: str | None) -> bool:
        """Deliver nothing until a time (RFC 3339), or until `resume`; tell whether there is such a consumer."""
        query = {"pause_until": until or _FOR_EVER}
        return bool(await self._ask(f"$JS.API.CONSUMER.PAUSE.{stream}.{name}", query, missing_is_fine=True))

    async def resume(self, stream: str, name: str) -> bool:
        """Deliver again; tell whether there is such a consumer."""
        known = bool(await self._ask(f"$JS.API.CONSUMER.PAUSE.{stream}.{name}", {}, missing_is_fine=True))
        # The broker looks at the pulls that wait since before only when another one comes; this one can get nothing.
        query = msgspec.json.encode({"batch": 1, "no_wait": True, "max_bytes": 1})
        with suppress(BrokerUnavailable):
            await self._broker.request(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", query, timeout=NUDGE_SECONDS)
        return known

    async def all_of(self, stream: str) -> list[DurableInfo]:
        """Return all consumers of a stream (the broker allows 1,000 by default); none where there is no stream."""
        found: list[DurableInfo] = []
        while True:
            data = await self._ask(f"$JS.API.CONSUMER.LIST.{stream}", {"offset": len(found)}, missing_is_fine=True)
            page = msgspec.json.decode(data or b"{}", type=_Page)
            found += page.consumers or []
            if not page.consumers or len(found) >= page.total:
                return found

    async def _ask(self, subject: str, query: Any = None, *, missing_is_fine: bool = False) -> bytes:
        """Return the answer; empty for what is missing."""
        data = b"" if query is None else msgspec.json.encode(query)
        answer = await self._broker.request(subject, data, timeout=ASK_SECONDS)
        if answer is None:
            raise BrokerUnavailable(f"{subject}: JetStream does not answer")
        error = msgspec.json.decode(answer, type=_Failed).error
        if error is None:
            return answer
        if error.code == 404 and missing_is_fine:
            return b""
        if error.code >= 500 and error.err_code != _WRONG_SETTING:
            raise BrokerUnavailable(f"{subject}: {error.description} ({error.err_code})")
        raise DurableRefused(error.description, error.err_code)
