"""Dead requests: end requests that cannot run, and keep them in the stream ``REQUESTS_DEAD`` to be inspected.

A request is dead when it cannot be decoded, or when `max_deliver` producers have begun it and failed.
"""

import msgspec
import structlog

from schemas.requests import Request
from schemas.subjects import dead_subject
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.jetstream.errors import APIError
from services.producer.adapters.publisher import Lease
from services.producer.errors import ProducerError
from services.producer.lane import QueueMessage
from services.producer.relay import Relay, RelayContext

__all__ = ["DeadRequests"]

log = structlog.get_logger()
_REASON_LIMIT = 200  # characters of a header


class _RequestAddress(msgspec.Struct):
    """The address of an otherwise unreadable request."""

    tenant: str
    session: str
    generation: str
    partition: int | None = None


class DeadRequests:
    """Move dead requests of one pool out of the work queue."""

    def __init__(self, context: RelayContext, pool: str) -> None:
        self._context = context
        self._broker = context.broker
        self._pool = pool

    async def reject(self, msg: QueueMessage, attempt: int, lease: Lease, reason: str) -> bool:
        """Close the generation of an unreadable request as failed, where its address can be decoded, and bury it.

        Return whether that worked; the request must be delivered again otherwise.
        """
        try:
            address = msgspec.json.decode(msg.data, type=_RequestAddress)
            request = Request(
                tenant=address.tenant,
                session=address.session,
                generation=address.generation,
                partition=address.partition,
                model="",
                messages=[],
            )
            await Relay(request, attempt, lease, self._context).fail_unrun(f"the request cannot be decoded: {reason}")
        except (msgspec.DecodeError, ValueError, RecursionError):
            log.warning("address of an unreadable request not decoded", subject=msg.subject)
        except (ProducerError, BrokerUnavailable) as error:
            log.warning("request handed back", subject=msg.subject, detail=str(error))
            return False
        return await self.bury(msg, reason)

    async def bury(self, msg: QueueMessage, reason: str) -> bool:
        """Store a request in ``REQUESTS_DEAD``; return whether that worked."""
        subject = dead_subject(self._pool, msg.subject.rsplit(".", 1)[-1])
        headers = {"Tailrace-Reason": reason[:_REASON_LIMIT], "Nats-Msg-Id": msg.subject}
        try:
            await self._broker.publish_stored(subject, msg.data, headers=headers)
        except (BrokerUnavailable, APIError) as error:
            log.warning("dead request not stored", detail=str(error))
            return False
        return True
