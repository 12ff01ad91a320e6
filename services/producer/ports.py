"""What the relay needs from the outside."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

import msgspec

from schemas.requests import Message
from schemas.usage import Usage
from services.producer.core.parts import Part, UpstreamFailure

__all__ = ["UpstreamRequest", "Upstream", "UpstreamRefused", "UpstreamStream", "UsageSource"]


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call of one model at one provider. ``params`` in the OpenAI chat form; each dialect translates."""

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
    """A provider's answer while it arrives."""

    async def read(self) -> list[Part] | None:
        """Return what the next socket read held (maybe nothing yet); ``None`` at the end of the stream.

        A connection that breaks is returned as an ``UpstreamFailure`` part, not raised.
        """
        ...


@runtime_checkable
class UsageSource(Protocol):
    """A provider that can be asked afterwards what an answer used."""

    async def usage_of(self, upstream_id: str) -> Usage | None:
        """Return the usage of an answer by the provider's own name of it; ``None`` while it is not known."""
        ...


class Upstream(Protocol):
    """A provider that can be called. Leaving the context closes the connection to it at once."""

    def open(self, call: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamStream]:
        """Call the model and enter when its answer's headers are there.

        Raises:
            UpstreamRefused: no stream began.
        """
        ...
