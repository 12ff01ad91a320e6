"""Encode, send and decode requests to JetStream's API."""

from typing import Any, Final, Protocol, TypeVar

import msgspec

from services.kit.jetstream.errors import APIError, BrokerUnavailable

__all__ = ["ASK_SECONDS", "Requester", "ask", "decode_answer"]

T = TypeVar("T")
ASK_SECONDS: Final = 5.0


class Requester(Protocol):
    """The request method of a connection."""

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> bytes | None:
        """Return the answer; ``None`` without a listener."""


class _Failed(msgspec.Struct):
    class _Error(msgspec.Struct):
        code: int = 0
        err_code: int = 0
        description: str = ""

    error: _Error | None = None


async def ask(
    broker: Requester, operation: str, type_: type[T], query: Any = None, *, timeout: float = ASK_SECONDS
) -> T:
    """Return JetStream's answer to an operation, such as ``STREAM.INFO.REQUESTS``; ``query`` is sent as JSON.

    Raises:
        BrokerUnavailable: no answer within ``timeout`` seconds, or one that cannot be read.
        APIError: JetStream refuses.
    """
    subject = f"$JS.API.{operation}"
    data = b"" if query is None else msgspec.json.encode(query)
    return decode_answer(await broker.request(subject, data, timeout=timeout), type_, subject)


def decode_answer(data: bytes | None, type_: type[T], subject: str) -> T:
    """Decode an answer of JetStream; ``None`` means that there was no listener.

    Raises:
        BrokerUnavailable: there is none, or it cannot be read.
        APIError: it is a refusal.
    """
    if data is None:
        raise BrokerUnavailable(f"{subject}: JetStream does not answer")
    try:
        if b'"error"' in data and (error := msgspec.json.decode(data, type=_Failed).error) is not None:
            raise APIError(error.code, error.err_code, error.description)
        return msgspec.json.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise BrokerUnavailable(f"{subject}: the answer is not readable: {data[:200]!r}") from error
