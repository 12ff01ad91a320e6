"""The interface of a dialect, and the types that all dialects share on the wire."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import msgspec

from services.producer.core.parts import Part, UpstreamFailure
from services.producer.ports import UpstreamRequest

__all__ = ["NO_HEADERS", "Dialect", "HttpCall", "Parser", "UntranslatableCall", "endpoint", "post", "translating"]

NO_HEADERS: Final[Mapping[str, str]] = {}


class HttpCall(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP POST. ``headers`` have lowercase names and hold the key: never log them."""

    url: str
    headers: dict[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"HttpCall(url={self.url!r}, headers={sorted(self.headers)}, body={len(self.body)} bytes)"


class UntranslatableCall(ValueError):
    """The request cannot be expressed in this provider's API."""


class Parser(Protocol):
    """Parse one answer."""

    def feed(self, data: bytes) -> list[Part]:
        """Return the parts that ``data`` completes, adjacent fragments of one kind joined.

        An ``End`` or an ``UpstreamFailure`` is the last part a parser ever returns; later input is ignored. A
        ``NoticePart`` is the last part of a list or directly before the ending.
        """
        ...

    def finish(self, broken: str = "") -> list[Part]:
        """Return the remaining parts at the end of the body; the last one is the ending, unless `feed` has returned it.

        ``broken``: why the connection broke; empty if the body ended properly.
        """
        ...


class Dialect(Protocol):
    """One kind of provider's API: build its requests and parse its responses."""

    def request(
        self, call: UpstreamRequest, base_url: str, key: str | None, extra_headers: Mapping[str, str]
    ) -> HttpCall:
        """Return the HTTP call that requests a streamed answer. ``extra_headers`` override the dialect's own.

        Raises:
            UntranslatableCall: the request cannot be expressed in the provider's API.
        """
        ...

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser of an answer with these response headers (case-insensitive mapping)."""
        ...

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return the failure of an error response. ``now``: seconds since 1970, for dates in ``Retry-After``.

        The message is the provider's own text, which must be scrubbed before it is shown.
        """
        ...


@contextmanager
def translating() -> Iterator[None]:
    """Convert errors of a translation to `UntranslatableCall`: an unexpected shape is the caller's mistake.

    Raises:
        UntranslatableCall: a value in the call has the wrong type.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise UntranslatableCall(f"a parameter or message has the wrong shape: {error}") from error


def endpoint(base_url: str, version: str, path: str) -> str:
    """Return the address of ``path`` below a base that may or may not end with the API's version already."""
    base = base_url.rstrip("/")
    return f"{base}{path}" if base.endswith(version) else f"{base}{version}{path}"


def post(url: str, body: dict[str, Any], own: Mapping[str, str | None], extra: Mapping[str, str]) -> HttpCall:
    """Return the POST of a JSON body that requests an uncompressed event stream; ``None`` headers are omitted."""
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "user-agent": "tailrace",
    }
    headers |= {name: value for name, value in own.items() if value is not None}
    headers |= {name.lower(): value for name, value in extra.items()}
    return HttpCall(url=url, headers=headers, body=msgspec.json.encode(body))
