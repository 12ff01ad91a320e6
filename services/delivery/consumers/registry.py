"""Create, change, find and remove durable consumers on the streams of all partitions.

There is no table of consumers: each of the broker's consumers carries its definition, and the newest definition is
valid. A partition without the consumer gets it at the next lookup, from a position that skips no event. Removal marks
all of the broker's consumers first, so that the next lookup after an interrupted removal completes it.
"""

import weakref
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from schemas.cursor import CursorIssuer
from schemas.topology import service_durable, service_of
from services.delivery import metrics
from services.delivery.consumers.dead import DeadEvents
from services.delivery.consumers.definition import (
    AGAIN,
    ConsumerSpec,
    Definition,
    changed,
    definition_of,
    durable_config,
    first_position,
    later_position,
    log_of,
    resumed_position,
    seconds,
    stream_of,
)
from services.delivery.consumers.judging import Judge
from services.delivery.consumers.session import ConsumerSession, Opened, Origin
from services.delivery.errors import TooBusy, Unknown
from services.delivery.fanout.start_position import check_cursor
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.log.states import LogStates
from services.delivery.settings import Settings
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable, StreamState
from services.kit.jetstream.consumer import DurableInfo, Durables
from services.kit.jetstream.errors import APIError

__all__ = ["Conflicting", "Consumers", "Found"]

log = structlog.get_logger()
PARTITIONS_SECONDS: Final = 5.0
RECENT_SECONDS: Final = 3.0
RECENT: Final = 1_000
_KEPT: Final = ("deliver_policy", "opt_start_seq", "opt_start_time")


class Conflicting(Exception):
    """Reject: the request changes fields that cannot be changed."""


class Found(NamedTuple):
    """A consumer: its definition, and its broker's consumers by partition."""

    definition: Definition
    infos: Mapping[int, DurableInfo]


class Consumers:
    """Manage all durable consumers, one object per process. Methods raise `BrokerUnavailable` without a broker."""

    def __init__(
        self, broker: Broker, clock: Clock, states: LogStates, supervisor: Supervisor, settings: Settings
    ) -> None:
        self.broker = broker
        self.clock = clock
        self.supervisor = supervisor
        self.dead = DeadEvents(broker, settings.consumer_dead)
        self.durables = Durables(broker)
        self._states = states
        self._limit = settings.consumers
        self._inactive = settings.consumer_inactive
        self._judge = Judge(broker)
        self._sessions: weakref.WeakSet[ConsumerSession] = weakref.WeakSet()
        self._partitions: tuple[float, list[int]] | None = None
        self._cache: dict[tuple[str, str], tuple[float, Found]] = {}  # bounded by RECENT
        broker.on_reconnect(self._reconnected)

    async def put(self, tenant: str, name: str, spec: ConsumerSpec) -> tuple[Found, bool]:
        """Create or change a consumer; return it and whether it is new. Idempotent.

        Raises:
            Conflicting: it exists with another start position or session.
            TooBusy: the tenant or the broker has the most consumers allowed.
            APIError: the broker refuses a setting.
            CursorForeign, CursorExpired: the cursor ``after`` cannot be used.
        """
        found = await self._find(tenant, name, fresh=True)
        if found is None:
            return await self._create(tenant, name, spec), True
        if fields := changed(found.definition, spec):
            raise Conflicting(f"{', '.join(fields)} of a consumer cannot be changed: delete it, or choose another name")
        if spec != found.definition.spec:
            self._cache.pop((tenant, name), None)
            definition = Definition(spec=spec, revision=found.definition.revision + 1)
            found = await self._reconcile(tenant, name, Found(definition, found.infos))
        return found, False

    async def get(self, tenant: str, name: str) -> Found:
        """Return a consumer.

        Raises:
            Unknown: it does not exist.
        """
        found = await self._find(tenant, name)
        if found is None:
            raise Unknown(f"there is no consumer {name!r}")
        return found

    async def recent(self, tenant: str, name: str) -> Found:
        """Return a consumer from a cache of `RECENT_SECONDS`.

        Raises:
            Unknown: it does not exist.
        """
        now = self.clock.monotonic()
        cached = self._cache.get((tenant, name))
        if cached is None or now - cached[0] > RECENT_SECONDS:
            self._cache.pop((tenant, name), None)
            cached = self._cache[tenant, name] = (now, await self.get(tenant, name))
            if len(self._cache) > RECENT:
                del self._cache[next(iter(self._cache))]
        return cached[1]

    async def all_of(self, tenant: str) -> dict[str, Found]:
        """Return the consumers of a tenant, sorted by name."""
        each: dict[str, dict[int, DurableInfo]] = {}
        for partition in [*await self._logs(), AGAIN]:
            for info in await self.durables.all_of(stream_of(partition)):
                owner = service_of(info.name)
                if owner is not None and owner[0] == tenant:
                    each.setdefault(owner[1], {})[partition] = info
        merged = {name: _merged(infos) for name, infos in sorted(each.items())}
        return {name: found for name, found in merged.items() if found is not None and not found.definition.deleted}

    async def delete(self, tenant: str, name: str) -> None:
        """Remove a consumer, its position and its dead events.

        Raises:
            Unknown: it does not exist.
        """
        found = await self.get(tenant, name)
        self._cache.pop((tenant, name), None)
        doomed = msgspec.structs.replace(found.definition, revision=found.definition.revision + 1, deleted=True)
        for partition, info in sorted(found.infos.items()):
            await self._change(tenant, name, doomed, partition, info, len(found.infos) - 1)
        await self._remove(tenant, name, found)

    async def pause(self, tenant: str, name: str, until: str | None) -> Found:
        """Pause deliveries until a time (RFC 3339), or until `resume` when ``until`` is ``None``.

        Raises:
            Unknown: it does not exist.
        """
        for partition in (await self.get(tenant, name)).infos:
            await self.durables.pause(stream_of(partition), service_durable(tenant, name), until)
        return await self.get(tenant, name)

    async def resume(self, tenant: str, name: str) -> Found:
        """Resume deliveries.

        Raises:
            Unknown: it does not exist.
        """
        for partition in (await self.get(tenant, name)).infos:
            await self.durables.resume(stream_of(partition), service_durable(tenant, name))
        return await self.get(tenant, name)

    async def open(self, tenant: str, name: str) -> ConsumerSession:
        """Open a session that reads through a consumer; the caller closes it.

        Raises:
            Unknown: it does not exist.
        """
        found = await self.get(tenant, name)

        async def reload() -> Opened | None:
            try:
                again = await self.recent(tenant, name)
            except Unknown:
                return None
            return await self._opened(tenant, name, again)

        opened = await self._opened(tenant, name, found)
        session = ConsumerSession(self.broker, self.clock, self._judge, self.dead, opened, reload)
        await session.open()
        self._sessions.add(session)
        return session

    async def incarnation(self, partition: int) -> str:
        """Return the incarnation of a partition's stream in the form that tokens contain.

        Raises:
            Unknown: the partition does not exist.
        """
        if partition != AGAIN and partition not in await self._logs():
            raise Unknown(f"there is no partition {partition}")
        return CursorIssuer(0, (await self._state(partition)).incarnation, "", "").incarnation

    async def _opened(self, tenant: str, name: str, found: Found) -> Opened:
        streams: dict[int, Origin] = {}
        for partition, info in found.infos.items():
            state = await self._state(partition)
            has_passed = info.delivered.consumer_seq > 0 and info.delivered.stream_seq > state.base
            is_cut = state.lost > state.base and not has_passed
            streams[partition] = Origin(
                stream_of(partition), state.incarnation, info.created, state.base if is_cut else None
            )
        return Opened(tenant, name, service_durable(tenant, name), found.definition, streams)

    async def _state(self, partition: int) -> StreamState:
        if partition == AGAIN:
            return await self.broker.state(stream_of(AGAIN))
        return await self._states.state(partition)

    async def _logs(self, *, fresh: bool = False) -> list[int]:
        """Return the existing partitions from a cache of `PARTITIONS_SECONDS`; ``fresh``: read them again."""
        now = self.clock.monotonic()
        if self._partitions is None or fresh or now - self._partitions[0] > PARTITIONS_SECONDS:
            self._partitions = (now, await self.broker.partitions())
        return self._partitions[1]

    async def _find(self, tenant: str, name: str, *, fresh: bool = False) -> Found | None:
        """Return a consumer after repairing its missing or outdated parts, or None when it does not exist.

        Partitions are read one after another: a removal marks all of the broker's consumers before it removes the
        first, so a reader that finds one missing sees the mark on the remaining ones.
        """
        durable = service_durable(tenant, name)
        infos: dict[int, DurableInfo] = {}
        partitions = [*await self._logs(fresh=fresh), AGAIN]
        for partition in partitions:
            info = await self.durables.info(stream_of(partition), durable)
            if info is not None:
                infos[partition] = info
        found = _merged(infos)
        if found is None:
            return None
        if found.definition.deleted:
            await self._remove(tenant, name, found)
            return None
        missing = [partition for partition in partitions if partition not in infos]
        if await self._has_expired(found, missing):
            await self._remove(tenant, name, found)
            return None
        whole = not missing and all(definition_of(info) == found.definition for info in infos.values())
        if whole and not any([await self._has_stale_position(partition, info) for partition, info in infos.items()]):
            return found
        return await self._reconcile(tenant, name, found)

    async def _has_stale_position(self, partition: int, info: DurableInfo) -> bool:
        """Return whether a consumer's position belongs to another incarnation of its stream, or is beyond its end."""
        if partition == AGAIN and info.delivered.stream_seq == 0:
            return False
        state = await self._state(partition)
        if info.delivered.stream_seq > state.last_seq and partition != AGAIN:
            state = await self._states.state(partition, fresh=True)  # the cached state may be a second old
        return log_of(info) != _log(partition, state) or info.delivered.stream_seq > state.last_seq

    async def _has_expired(self, found: Found, missing: list[int]) -> bool:
        """Return whether the broker has begun to remove an inactive consumer: some parts are gone, others follow.

        Otherwise a missing part is a partition that was added or re-created since, or an interrupted creation.
        """
        inactive, born = self._inactive, min(seconds(info.created) for info in found.infos.values())
        if not missing or not inactive or self.clock.wall() - born < inactive:
            return False
        return any([seconds((await self._state(partition)).created) < born for partition in missing])

    async def _create(self, tenant: str, name: str, spec: ConsumerSpec) -> Found:
        if len(await self.all_of(tenant)) >= self._limit:
            raise TooBusy(f"this tenant has {self._limit} consumers, the largest number: delete one")
        await self._check_start(tenant, spec)
        await self.dead.clear(tenant, name)  # left over from a consumer that the broker removed for inactivity
        definition = Definition(spec=spec)
        infos: dict[int, DurableInfo] = {}
        partitions = [*await self._logs(), AGAIN]
        try:
            for partition in partitions:
                config = await self._config(tenant, name, definition, partition, len(partitions) - 1)
                config |= first_position(spec, partition)
                infos[partition] = await self.durables.create(stream_of(partition), config)
        except APIError as error:
            if error.is_existing:
                raise BrokerUnavailable(f"consumer {name!r} is being created by another request: try again") from error
            await self._remove(tenant, name, Found(definition, infos))
            if error.is_too_many:
                raise TooBusy(f"the broker accepts no more consumers: {error}") from error
            raise
        return Found(definition, infos)

    async def _check_start(self, tenant: str, spec: ConsumerSpec) -> None:
        if spec.after is None or spec.session is None:
            return
        issuer = await self._states.issuer(tenant, spec.session)
        state = await self._states.state(issuer.partition, fresh=True)
        check_cursor(spec.after, issuer, state.first_seq, state.last_seq)

    async def _reconcile(self, tenant: str, name: str, found: Found) -> Found:
        """Update the consumer of every partition to the definition, and create the missing ones.

        Existing ones come first, so that a concurrent removal is detected before anything is created.
        """
        definition, infos = found.definition, dict(found.infos)
        partitions = [*await self._logs(), AGAIN]
        born = min(info.created for info in infos.values())
        paused = next((info for info in infos.values() if info.paused), None)
        for partition in sorted(partitions, key=lambda each: each not in infos):
            info = infos.get(partition)
            resumed = None if info is None else await self._resumed(partition, info)
            if info is not None and resumed is None:
                infos[partition] = await self._change(tenant, name, definition, partition, info, len(partitions) - 1)
                continue
            config = await self._config(tenant, name, definition, partition, len(partitions) - 1)
            if resumed is not None:
                metrics.CONSUMER_RESUMED.inc()
                log.warning("consumer restarted where its log was cut off", consumer=name, partition=partition)
                await self.durables.delete(stream_of(partition), service_durable(tenant, name))
                config |= resumed
            else:
                log.info("consumer added to a partition", consumer=name, partition=partition)
                state = await self._state(partition)
                config |= later_position(definition.spec, partition, state.incarnation, born)
            if paused is not None:
                config["pause_until"] = paused.config["pause_until"]
            try:
                infos[partition] = await self.durables.create(stream_of(partition), config)
            except APIError as error:
                if not error.is_existing:
                    raise
        return Found(definition, infos)

    async def _resumed(self, partition: int, info: DurableInfo) -> dict[str, Any] | None:
        """Return the new start position of a consumer, or None when its position is valid."""
        if not await self._has_stale_position(partition, info):
            return None
        state = await self._state(partition)
        return resumed_position(info, 0 if partition == AGAIN else min(state.base, state.last_seq))

    async def _config(
        self, tenant: str, name: str, definition: Definition, partition: int, partitions: int
    ) -> dict[str, Any]:
        log_ = _log(partition, await self._state(partition))
        return durable_config(tenant, name, definition, partition, partitions, self._inactive, log_)

    async def _change(
        self, tenant: str, name: str, definition: Definition, partition: int, info: DurableInfo, partitions: int
    ) -> DurableInfo:
        config = await self._config(tenant, name, definition, partition, partitions)
        config |= {field: info.config[field] for field in _KEPT if field in info.config}
        try:
            return await self.durables.update(stream_of(partition), config)
        except APIError as error:
            if error.is_missing:
                raise Unknown(f"consumer {name!r} is being removed") from error
            raise

    async def _remove(self, tenant: str, name: str, found: Found) -> None:
        for partition in sorted(found.infos):
            await self.durables.delete(stream_of(partition), service_durable(tenant, name))
        await self.dead.clear(tenant, name)

    async def _reconnected(self) -> None:
        for session in list(self._sessions):
            session.reconnected()


def _log(partition: int, state: StreamState) -> str:
    """Return the incarnation of the log that a consumer of a partition stores."""
    return "" if partition == AGAIN else state.incarnation


def _merged(infos: Mapping[int, DurableInfo]) -> Found | None:
    """Return the newest definition with all consumers, or None when no consumer has a definition."""
    definitions = [definition for definition in map(definition_of, infos.values()) if definition is not None]
    if not definitions:
        return None
    return Found(max(definitions, key=lambda d: (d.revision, d.deleted, msgspec.json.encode(d))), infos)
