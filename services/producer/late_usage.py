"""Usage that a provider tells only after the end: looked up, and appended to the log behind the terminal."""

import asyncio
from typing import Final

import structlog
import tenacity

from schemas.codec import encode_event
from schemas.events import UsageReported
from schemas.subjects import Address, token_subject
from schemas.topology import token_stream
from schemas.usage import Usage
from services.kit.broker import Broker, BrokerUnavailable
from services.kit.clock import Clock
from services.kit.shutdown import end
from services.producer import metrics
from services.producer.adapters.publisher import Lease, Publisher
from services.producer.core.generation import Generation
from services.producer.core.registry import Provider
from services.producer.errors import ProducerError
from services.producer.ports import UsageSource

__all__ = ["LateUsage"]

log = structlog.get_logger()
TRIES: Final = 6
WAITING: Final = 1_000


class LateUsage:
    """Looks up what cancelled and failed generations cost, where their provider offers that.

    At most `WAITING` look-ups are under way; what is not found leaves the generation with our own count.
    """

    def __init__(self, broker: Broker, publisher: Publisher, clock: Clock) -> None:
        self._broker = broker
        self._publisher = publisher
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    def look_up(self, address: Address, generation: Generation, provider: Provider, source: UsageSource) -> None:
        """Begin a look-up beside everything else."""
        if generation.upstream_id is None or generation.usage is not None or len(self._tasks) >= WAITING:
            return
        task = asyncio.create_task(self._look_up(address, generation, provider, source))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is still under way."""
        await end(*self._tasks)

    async def _look_up(self, address: Address, generation: Generation, provider: Provider, source: UsageSource) -> None:
        assert generation.upstream_id is not None
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential(multiplier=1, max=30),
            retry=tenacity.retry_if_result(lambda usage: usage is None),
            retry_error_callback=lambda _state: None,
        )
        usage: Usage | None = await retrying(source.usage_of, generation.upstream_id)
        outcome = "missing"
        if usage is not None:
            outcome = "found" if await self._append(address, generation, usage) else "not appended"
        metrics.LATE_USAGE.labels(provider.name, outcome).inc()
        log.info("usage looked up", generation=generation.name, provider=provider.name, outcome=outcome)

    async def _append(self, address: Address, generation: Generation, usage: Usage) -> bool:
        event = UsageReported(
            generation=generation.name,
            seq=generation.next_seq,
            epoch=generation.epoch,
            at=round(self._clock.wall(), 6),
            usage=usage,
            provider=generation.provider,
            upstream_model=generation.upstream_model,
            upstream_id=generation.upstream_id,
            source="lookup",
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
        return True
