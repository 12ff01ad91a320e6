"""What services say became of the events they were given, passed on to the broker."""

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
"""Bound of tokens in one call."""
CONFIRM_SECONDS: Final = 2.0

Tokens = Annotated[list[str], msgspec.Meta(max_length=TOKENS)]


class Settlement(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens of events: handled, to be given again after ``delay`` seconds, and still being worked on."""

    acks: Tokens = []
    nacks: Tokens = []
    working: Tokens = []
    delay: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 0.0


class SettlementResult(msgspec.Struct):
    """How many the broker has confirmed, and the tokens of which nobody knows.

    ``unknown``: of a delivery that there was not, or from before the log was created anew.
    """

    settled: int
    unknown: list[str]


async def settle(consumers: Consumers, tenant: str, name: str, settlement: Settlement) -> SettlementResult:
    """Pass a service's words on to the broker, and wait until it has taken them.

    Raises:
        InvalidToken: a token is none; nothing has been passed on.
        BrokerUnavailable: the broker is away.
    """
    durable = service_durable(tenant, name)
    groups: tuple[tuple[str, Sequence[str], bytes], ...] = (
        ("ack", settlement.acks, ACK),
        ("nack", settlement.nacks, nak(settlement.delay)),
        ("working", settlement.working, IN_PROGRESS),
    )
    todo = [(text, Token.parse(text), how, word) for how, texts, word in groups for text in texts]
    known = {partition: await _incarnation(consumers, partition) for partition in {each[1].partition for each in todo}}

    async def one(text: str, token: Token, how: str, word: bytes) -> str | None:
        if token.incarnation != known[token.partition]:
            return text
        subject = token.subject(durable)
        try:
            if await consumers.broker.request(subject, word, timeout=CONFIRM_SECONDS) is None:
                return text
        except BrokerUnavailable:
            if not consumers.broker.is_connected:
                raise
            return text  # the broker does not answer for what it has not delivered
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
