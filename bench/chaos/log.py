"""Read the log and the work queue directly."""

import msgspec

from bench.chaos.history import Logged
from bench.chaos.stage import PARTITIONS
from schemas.topology import REQUESTS, token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["read_log", "waiting"]


class _Info(msgspec.Struct):
    class _State(msgspec.Struct):
        messages: int

    state: _State


async def waiting(broker: Broker) -> int:
    """Return the number of requests in the work queue, running ones included.

    Raises:
        BrokerUnavailable: the broker does not answer.
    """
    data = await broker.request(f"$JS.API.STREAM.INFO.{REQUESTS}")
    try:
        return msgspec.json.decode(data or b"", type=_Info).state.messages
    except msgspec.DecodeError as error:
        raise BrokerUnavailable(str(error)) from error


async def read_log(broker: Broker, partitions: int = PARTITIONS) -> list[Logged]:
    """Return all stored messages, each partition in its order.

    Raises:
        BrokerUnavailable: it cannot be read, or not to its end.
    """
    found: list[Logged] = []
    for partition in range(partitions):
        state = await broker.state(token_stream(partition))
        reached = 0
        async for batch in broker.read(token_stream(partition), f"tokens.{partition}.*.*.*"):
            found += [Logged(partition=partition, seq=m.seq, subject=m.subject, data=m.data.decode()) for m in batch]
            reached = batch[-1].seq
        if reached < state.last_seq:
            raise BrokerUnavailable(f"the replica that answered has {reached} of {state.last_seq}")
    return found
