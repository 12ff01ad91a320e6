"""Create and update streams, consumers and buckets, on one server or on a cluster that is still electing leaders.

Each object is read first and changed only where it differs. So a restart changes nothing, an operator's other settings
stay, and a service with read permissions only waits for another one to make the change.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog

from schemas.partitions import HISTORY_SUBJECT, decode_history, encode_history, extended
from schemas.topology import REGISTRY_BUCKET, ConsumerSpec, StreamSpec, Topology, bucket_stream, token_partition
from services.kit.jetstream import api
from services.kit.jetstream.api import ASK_SECONDS, Requester
from services.kit.jetstream.connection import expecting
from services.kit.jetstream.errors import (
    CONSUMER_CREATE_FAILED,
    REPLICAS_NOT_SUPPORTED,
    STREAM_NAME_EXISTS,
    APIError,
    BrokerUnavailable,
)

__all__ = ["NotReady", "Refused", "apply_topology", "consumer_config", "stream_config", "token_partitions"]

log = structlog.get_logger()
APPLY_SECONDS: Final = 60.0
"""Seconds to retry. A starting cluster has its leaders after 5 to 20 s."""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0


class NotReady(Exception):
    """The broker cannot do it yet: no leader, too few servers, or another service must create the object."""


class Refused(Exception):
    """The broker refuses permanently."""


class _Message(msgspec.Struct, frozen=True):
    seq: int = 0
    data: bytes = b""  # base64 in JSON


class _Answer(msgspec.Struct):
    config: dict[str, Any] = {}
    streams: list[str] | None = None
    total: int = 0
    message: _Message = _Message()


async def apply_topology(broker: Requester, topology: Topology, wait: float = APPLY_SECONDS) -> Topology:
    """Create missing objects and update those that differ; return the topology with the partitions of earlier settings.

    Retries for ``wait`` seconds while the broker does not answer. Repeated and concurrent calls change nothing more.
    Streams beyond the configured number of partitions are kept.

    Raises:
        Refused: the broker refuses a setting.
        NotReady: the cluster did not get ready in time.
    """
    give_up_at = asyncio.get_running_loop().time() + wait
    pause = _FIRST_PAUSE
    while True:
        try:
            return await _apply(broker, topology)
        except (NotReady, BrokerUnavailable) as error:
            if asyncio.get_running_loop().time() > give_up_at:
                raise NotReady(f"not ready within {wait:g} s: {error}") from error
            log.debug("streams are not ready", detail=str(error))
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _apply(broker: Requester, topology: Topology) -> Topology:
    existing = await token_partitions(broker)
    topology = msgspec.structs.replace(topology, kept=tuple(p for p in existing if p >= topology.partitions))
    for stream in topology.streams():
        await _apply_stream(broker, stream, managed=topology.managed)
    for consumer in topology.consumers():
        await _apply_consumer(broker, consumer, managed=topology.managed)
    if topology.managed:
        # Streams without a partition history predate it: their number is the partition count of that time.
        await _extend_history(broker, topology.partitions, (max(existing) + 1,) if existing else ())
    return topology


async def token_partitions(broker: Requester) -> list[int]:
    """Return the partitions whose streams exist, whatever the configured count, in ascending order.

    Raises:
        NotReady: the broker cannot answer now.
    """
    names: list[str] = []
    while True:
        query = {"subject": "tokens.>", "offset": len(names)}
        page = await _ask(broker, "STREAM.NAMES", query)
        names += page.streams or []
        if not page.streams or len(names) >= page.total:
            return sorted(p for p in map(token_partition, names) if p is not None)


async def _apply_stream(broker: Requester, spec: StreamSpec, *, managed: bool) -> None:
    wanted = stream_config(spec)
    found = await _ask(broker, f"STREAM.INFO.{spec.name}", missing_is_fine=True)
    if found is None:
        if not managed:
            raise NotReady(f"stream {spec.name} does not exist, and this service may not create it")
        await _ask(broker, f"STREAM.CREATE.{spec.name}", wanted)
        return
    differing = _differing(found.config, wanted)
    if differing and managed:
        log.info("stream changed", stream=spec.name, fields=sorted(differing))
        await _ask(broker, f"STREAM.UPDATE.{spec.name}", found.config | differing)


async def _apply_consumer(broker: Requester, spec: ConsumerSpec, *, managed: bool) -> None:
    wanted = consumer_config(spec)
    found = await _ask(broker, f"CONSUMER.INFO.{spec.stream}.{spec.durable}", missing_is_fine=True)
    if found is not None:
        # A consumer's ack policy and start cannot be changed; an existing consumer keeps both.
        wanted = wanted | {name: found.config.get(name) for name in ("ack_policy", "deliver_policy")}
        wanted = found.config | _differing(found.config, wanted)
        if wanted == found.config:
            return
    if managed:
        operation = f"CONSUMER.DURABLE.CREATE.{spec.stream}.{spec.durable}"
        await _ask(broker, operation, {"stream_name": spec.stream, "config": wanted})
    elif found is None:
        raise NotReady(f"consumer {spec.durable} does not exist, and this service may not create it")


async def _extend_history(broker: Requester, count: int, before: tuple[int, ...]) -> None:
    registry = bucket_stream(REGISTRY_BUCKET)
    stored = await _ask(broker, f"STREAM.MSG.GET.{registry}", {"last_by_subj": HISTORY_SUBJECT}, missing_is_fine=True)
    history, seq = before, 0
    if stored is not None:
        history = decode_history(stored.message.data)
        seq = stored.message.seq
        if history[-1] == count:
            return
    data = encode_history(extended(history, count))
    headers = expecting(seq)
    answer = await broker.request(HISTORY_SUBJECT, data, timeout=ASK_SECONDS, headers=headers)
    try:
        api.decode_answer(answer, _Answer, HISTORY_SUBJECT)
    except APIError as error:
        raise _failure(HISTORY_SUBJECT, error) from error
    if history and history != (count,):
        log.warning("the number of partitions has changed", history=history, now=count)


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the wanted fields that differ; the broker omits fields that are empty or false."""
    return {name: value for name, value in wanted.items() if (found.get(name) or None) != (value or None)}


def stream_config(spec: StreamSpec) -> dict[str, Any]:
    """Return a stream's configuration in the form of JetStream's API (durations in nanoseconds)."""
    config = {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": "workqueue" if spec.work_queue else "limits",
        "discard": "new" if spec.refuses else "old",
        "discard_new_per_subject": spec.one_per_subject,
        "max_msgs_per_subject": 1 if spec.one_per_subject or spec.bucket or spec.counter else -1,
        "max_age": _nanoseconds(spec.max_age),
        "max_bytes": spec.max_bytes,
        "max_msgs": spec.max_msgs,
        "max_msg_size": spec.max_msg_size,
        "num_replicas": spec.replicas,
        "storage": "memory" if spec.counter else "file",
        "allow_direct": True,
        "duplicate_window": _nanoseconds(min(spec.duplicate_window, spec.max_age or spec.duplicate_window)),
    }
    if spec.republish is not None:
        config["republish"] = {"src": spec.republish[0], "dest": spec.republish[1]}
    if spec.counter:
        config["allow_msg_counter"] = True
    if spec.bucket:
        config |= {"allow_rollup_hdrs": True, "deny_delete": True}
    return config


def consumer_config(spec: ConsumerSpec) -> dict[str, Any]:
    """Return a durable consumer's configuration in the form of JetStream's API (durations in nanoseconds)."""
    return {
        "durable_name": spec.durable,
        "filter_subject": spec.filter,
        "ack_policy": "all" if spec.ack_all else "explicit",
        "deliver_policy": "all",
        "ack_wait": _nanoseconds(spec.ack_wait),
        "max_ack_pending": spec.max_ack_pending,
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


async def _ask(broker: Requester, operation: str, query: Any = None, *, missing_is_fine: bool = False) -> Any:
    """Return JetStream's answer; ``None`` for a missing object if ``missing_is_fine``."""
    try:
        return await api.ask(broker, operation, _Answer, query)
    except APIError as error:
        if error.is_missing and missing_is_fine:
            return None
        raise _failure(operation, error) from error


def _failure(operation: str, error: APIError) -> NotReady | Refused:
    text = f"{operation}: {error.description} ({error.err_code})"
    if error.err_code == REPLICAS_NOT_SUPPORTED:
        return Refused(f"{text}: more than one replica needs a cluster of nats-servers (TAILRACE_REPLICAS)")
    # Another process may create the same object now; a consumer may fail because its stream does not exist yet.
    is_raced = error.err_code in (STREAM_NAME_EXISTS, CONSUMER_CREATE_FAILED) or error.is_wrong_last_sequence
    return NotReady(text) if error.is_temporary or is_raced else Refused(text)
