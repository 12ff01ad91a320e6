"""Settle delivered events: forward acknowledgements of services to the broker."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from schemas.topology import service_durable
from services.delivery import metrics
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.tokens import Token
from services.delivery.errors import Unknown
from services.kit.jetstream.ack import ACK, IN_PROGRESS, nak
from services.kit.jetstream.broker import BrokerUnavailable

__all__ = ["SettlementResult", "Settlement", "settle"]

TOKENS: Final = 1_000
"""Most tokens of one kind in one call."""
CONFIRM_SECONDS: Final = 2.0

Tokens = Annotated[list[str], msgspec.Meta(max_length=TOKENS)]


class Settlement(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens of events: handled (``acks``), redeliver after ``delay`` s (``nacks``), in progress (``working``)."""

    acks: Tokens = []
    nacks: Tokens = []
    working: Tokens = []
    delay: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 0.0


class SettlementResult(msgspec.Struct):
    """``settled``: number of deliveries that the broker has confirmed.

    ``unknown``: tokens without a delivery, or from before the log was re-created.
    """

    settled: int
    unknown: list[str]


async def settle(consumers: Consumers, tenant: str, name: str, settlement: Settlement) -> SettlementResult:
    """Send a service's acknowledgements to the broker and wait for its confirmations.

    Raises:
        InvalidToken: a token is not valid; nothing was sent.
        BrokerUnavailable: the broker is not connected.
    """
    durable = service_durable(tenant, name)
    groups: tuple[tuple[str, Sequence[str], bytes], ...] = (
        ("ack", settlement.acks, ACK),
        ("nack", settlement.nacks, nak(settlement.delay)),
        ("working", settlement.working, IN_PROGRESS),
    )
    todo = [(text, Token.parse(text), how, payload) for how, texts, payload in groups for text in texts]
    incarnations = {
        partition: await _incarnation(consumers, partition) for partition in {each[1].partition for each in todo}
    }

    async def one(text: str, token: Token, how: str, payload: bytes) -> str | None:
        if token.incarnation != incarnations[token.partition]:
            return text
        subject = token.subject(durable)
        try:
            if await consumers.broker.request(subject, payload, timeout=CONFIRM_SECONDS) is None:
                return text
        except BrokerUnavailable:
            if not consumers.broker.is_connected:
                raise
            return text  # the broker does not reply for a delivery that it did not make
        metrics.CONSUMER_SETTLED.labels(how).inc()
        return None

    answers = await asyncio.gather(*(one(*each) for each in todo), return_exceptions=True)
    unknown: list[str] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None:
            unknown.append(answer)
    return SettlementResult(len(todo) - len(unknown), unknown)


async def _incarnation(consumers: Consumers, partition: int) -> str:
    try:
        return await consumers.incarnation(partition)
    except Unknown:
        return ""
