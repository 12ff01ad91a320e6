"""Look up the usage of calls that were left before their end, and append it to the log after the terminal."""

import asyncio
from typing import Final, NamedTuple

import structlog
import tenacity

from schemas.codec import encode_event
from schemas.events import UsageReported
from schemas.subjects import Address, token_subject
from schemas.topology import token_stream
from schemas.usage import Usage
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.tasks import BackgroundTasks
from services.producer import metrics
from services.producer.adapters.publisher import Lease, Publisher
from services.producer.core.bounds import usable
from services.producer.core.generation import Generation
from services.producer.errors import ProducerError
from services.producer.ports import UsageSource

__all__ = ["LateUsage", "UsageLookup"]

log = structlog.get_logger()
TRIES: Final = 6
WAITING: Final = 1_000


class UsageLookup(NamedTuple):
    """A call to look up. ``call``: its number, as in `UsageReported`; ``upstream_id``: the provider's identifier."""

    call: int
    upstream_id: str
    provider: str
    upstream_model: str


class LateUsage:
    """Look up the usage of incomplete calls at providers that offer it.

    At most `WAITING` generations at once; a call without a result keeps our own count.
    """

    def __init__(self, broker: Broker, publisher: Publisher, clock: Clock) -> None:
        self._broker = broker
        self._publisher = publisher
        self._clock = clock
        self._tasks = BackgroundTasks()  # bounded by WAITING

    def look_up(self, address: Address, generation: Generation, wanted: list[tuple[UsageLookup, UsageSource]]) -> None:
        """Look up calls of a generation that has ended, in the background."""
        if len(self._tasks) >= WAITING:
            return
        self._tasks.start(self._look_up(address, generation, wanted), name="late-usage")

    async def close(self) -> None:
        """Cancel the look-ups under way."""
        await self._tasks.close()

    async def _look_up(
        self, address: Address, generation: Generation, wanted: list[tuple[UsageLookup, UsageSource]]
    ) -> None:
        """Look up all calls at once, and append the results one after the other: each has the next seq."""
        lookups = [asyncio.create_task(_usage(source, call)) for call, source in wanted]
        try:
            for answer in asyncio.as_completed(lookups):
                call, usage = await answer
                outcome = "missing"
                if usage is not None:
                    outcome = "found" if await self._append(address, generation, call, usage) else "not appended"
                metrics.LATE_USAGE.labels(call.provider, outcome).inc()
                log.info(
                    "usage looked up",
                    generation=generation.name,
                    provider=call.provider,
                    call=call.call,
                    outcome=outcome,
                )
        finally:
            for task in lookups:
                task.cancel()
            await asyncio.gather(*lookups, return_exceptions=True)

    async def _append(self, address: Address, generation: Generation, call: UsageLookup, usage: Usage) -> bool:
        event = UsageReported(
            generation=generation.name,
            seq=generation.next_seq,
            epoch=generation.epoch,
            at=round(self._clock.wall(), 6),
            usage=usage,
            provider=call.provider,
            upstream_model=call.upstream_model,
            upstream_id=call.upstream_id,
            source="lookup",
            call=call.call,
        )
        subject = token_subject(address)
        lease = Lease(asyncio.get_running_loop().time() + self._publisher.give_up)
        writer = self._publisher.writer(subject, lease)
        try:
            last = await self._broker.last(token_stream(address.partition), subject)
            await writer.publish_first(encode_event(event), last.seq if last else 0)
        except (ProducerError, BrokerUnavailable) as error:
            log.warning("late usage not appended", generation=generation.name, detail=str(error))
            return False
        finally:
            writer.close()
        generation.next_seq += 1
        return True


async def _usage(source: UsageSource, call: UsageLookup) -> tuple[UsageLookup, Usage | None]:
    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_exponential(multiplier=1, max=30),
        retry=tenacity.retry_if_result(lambda usage: usage is None),
        retry_error_callback=lambda _state: None,
    )
    usage: Usage | None = await retrying(source.usage_of, call.upstream_id)
    return call, None if usage is None else usable(usage)
