"""Write the log for billing's measurement: concurrent generations, as producers write them."""

from collections.abc import Iterator

import msgspec

from schemas.codec import encode_event
from schemas.events import Completed, Delta, Event, Started, UsageReported
from schemas.subjects import Address, token_subject
from schemas.topology import Topology, token_stream
from schemas.usage import Counted, Usage
from services.kit.jetstream.broker import Broker

__all__ = ["Shape", "fill"]

START = 1_700_000_000.0
TOKENS = 3
ACKNOWLEDGED = 2_000


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Number of generations, deltas per generation, and concurrent generations."""

    generations: int
    deltas: int
    abreast: int

    @property
    def events(self) -> int:
        """Return the number of events in the log."""
        return self.generations * (self.deltas + 3)

    @property
    def output(self) -> int:
        """Return the number of output tokens."""
        return self.generations * self.deltas * TOKENS


async def fill(broker: Broker, shape: Shape) -> None:
    """Write the whole log."""
    await broker.apply(Topology())
    for number, (subject, data) in enumerate(_log(shape), 1):
        if number % ACKNOWLEDGED == 0 or number == shape.events:
            # Bound the unacknowledged messages: beyond 10,000 the broker drops some.
            await broker.publish_stored(subject, data)
        else:
            await broker.publish(subject, data)
    state = await broker.state(token_stream(0))
    assert state.last_seq == shape.events, f"the log holds {state.last_seq} of {shape.events} events"


def _log(shape: Shape) -> Iterator[tuple[str, bytes]]:
    for first in range(0, shape.generations, shape.abreast):
        several = range(first, min(first + shape.abreast, shape.generations))
        streams = [iter(_events(number, shape.deltas)) for number in several]
        subjects = [
            token_subject(Address(0, f"tenant-{number % 7}", f"session-{number % 500}", f"gen_{number:010}"))
            for number in several
        ]
        for _step in range(shape.deltas + 3):
            for subject, stream in zip(subjects, streams, strict=True):
                yield subject, encode_event(next(stream))


def _events(number: int, deltas: int) -> Iterator[Event]:
    name = f"gen_{number:010}"
    at = START + number
    counted = Counted(input=20, output=deltas * TOKENS, exact=True, encoding="o200k_base")
    model = f"model-{number % 5}"
    yield Started(
        generation=name,
        seq=0,
        at=at,
        model=model,
        provider="openai",
        upstream_model=model,
        counted=Counted(input=20, exact=True, encoding="o200k_base"),
        metadata={"user": f"u-{number % 50}"},
    )
    for step in range(deltas):
        yield Delta(generation=name, seq=step + 1, at=at + step / 50, text=" a few words", tokens=(step + 1) * TOKENS)
    usage = Usage(input=20, output=deltas * TOKENS, raw={"prompt_tokens": 20, "completion_tokens": deltas * TOKENS})
    yield UsageReported(generation=name, seq=deltas + 1, at=at + 9, usage=usage, upstream_id=f"up-{number}")
    yield Completed(generation=name, seq=deltas + 2, at=at + 9, finish_reason="stop", counted=counted)
