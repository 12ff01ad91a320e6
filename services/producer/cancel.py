"""Cancel running generations: obey cancel requests that arrive, and those noted before the generation ran.

Delivery notes a cancel in the look-up record (state ``cancelling``) and sends it to the generation's control subject.
Billing sends there that a hard limit of a budget was reached. Both end in `Interruption.interrupt`, as does
`services.producer.presence`, which cancels generations that have lost their last subscriber.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from schemas.control import CANCEL, HEARD, OVER, OVER_BUDGET
from schemas.requests import GenerationRecord, Request
from schemas.subjects import control_subject
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Subscription
from services.kit.tasks import BackgroundTasks
from services.producer.interruption import Interruption
from services.producer.lane import LEAVE_SECONDS

__all__ = ["CancelListener", "obey_noted_cancel"]

log = structlog.get_logger()
LINGER_SECONDS: Final = 1.0


def obey_noted_cancel(record: GenerationRecord, interruption: Interruption) -> None:
    """Interrupt a generation whose look-up record has the state ``cancelling``."""
    if record.state == "cancelling":
        interruption.interrupt("cancelled", "requested")


class CancelListener:
    """Answer the control subjects of running generations. ``tasks``: subscriptions that linger after an end."""

    def __init__(self, broker: Broker) -> None:
        self.tasks = BackgroundTasks()  # each for LINGER_SECONDS
        self._broker = broker
        self._lingering: set[Subscription] = set()

    async def listen(self, request: Request, interruption: Interruption, has_ended: Callable[[], bool]) -> Subscription:
        """Interrupt the generation on each request to cancel it, and answer whether it still ran.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """

        def control(data: bytes, reply: str) -> None:
            if has_ended():
                self._reply(reply, OVER)
                return
            if data == CANCEL:
                interruption.interrupt("cancelled", "requested")
            elif data == OVER_BUDGET:
                interruption.interrupt("over_budget", "budget_exceeded")
            self._reply(reply, HEARD)

        return await self._broker.respond(control_subject(request.tenant, request.session, request.generation), control)

    def linger(self, subscription: Subscription) -> None:
        """Keep answering for `LINGER_SECONDS` after the end, so that a cancel request under way does not time out."""

        async def leave() -> None:
            try:
                await asyncio.sleep(LINGER_SECONDS)
                await self._broker.leave(subscription, LEAVE_SECONDS)
            finally:
                self._lingering.discard(subscription)

        self._lingering.add(subscription)
        self.tasks.start(leave(), name="cancel-linger")

    async def stop(self, subscription: Subscription) -> None:
        """Stop listening at once, unless the subscription lingers."""
        if subscription not in self._lingering:
            await self._broker.unlisten(subscription)

    def _reply(self, subject: str, data: bytes) -> None:
        try:
            self._broker.answer(subject, data)
        except BrokerUnavailable as error:
            log.warning("cancel not answered", detail=str(error))
