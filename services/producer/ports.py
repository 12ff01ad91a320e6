"""Ports of the producer: a provider that can be called, and its streamed answer."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

import msgspec

from schemas.requests import Message
from schemas.usage import Usage
from services.producer.core.parts import Part, UpstreamFailure

__all__ = ["UpstreamRequest", "Upstream", "UpstreamRefused", "UpstreamStream", "UsageSource"]


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request of one call. ``params`` in the OpenAI chat form; each dialect translates them."""

    model: str
    messages: list[Message]
    params: dict[str, Any] = {}
    connect_timeout: float = 10.0


class UpstreamRefused(Exception):
    """The provider could not be reached, or answered with an error before its stream began.

    ``connected``: whether there was a connection at all.
    """

    def __init__(self, failure: UpstreamFailure, *, connected: bool = True) -> None:
        self.failure = failure
        self.connected = connected
        super().__init__(f"{failure.code}: {failure.message}")


class UpstreamStream(Protocol):
    """A provider's streamed answer."""

    async def read(self) -> list[Part] | None:
        """Read from the socket once and return the parts, maybe none; ``None`` at the end of the stream.

        A connection that breaks is returned as an ``UpstreamFailure`` part, not raised.
        """
        ...


@runtime_checkable
class UsageSource(Protocol):
    """A provider that reports the usage of an answer afterwards."""

    async def usage_of(self, upstream_id: str) -> Usage | None:
        """Return the usage of an answer by the provider's identifier, or ``None`` while it is unknown."""
        ...


class Upstream(Protocol):
    """A provider that can be called. Leaving the context closes the connection to it at once."""

    def open(self, call: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamStream]:
        """Call the model and enter when the headers of its answer have arrived.

        Raises:
            UpstreamRefused: no stream began.
        """
        ...
