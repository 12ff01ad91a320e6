"""The ASGI middleware of a service: reject bodies by their head, authenticate callers, and set response headers.

The principal is in the scope, under `PRINCIPAL`, before any body is read. So is a problem with the credentials:
`principal_of` raises it where error responses get their CORS headers.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from litestar.config.cors import CORSConfig

from services.kit.auth.principal import CHALLENGE, PRINCIPAL, STILL_VALID, Principal
from services.kit.loopback import is_address, is_loopback
from services.kit.problem import Problem, send_problem
from services.kit.request_head import BodyLimit, refused_body

__all__ = ["Authenticating", "entering", "is_public"]

_PUBLIC: Final = frozenset({"/", "/docs", "/healthz", "/readyz", "/metrics"})
_PUBLIC_BELOW: Final = ("/console/", "/docs/")
_TICKET: Final = "ticket"
_STREAMS: Final = "/events"  # suffix of the paths that a ticket may open
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_API_HEADERS: Final = (
    *_HEADERS,
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Authenticating(Protocol):
    """The port to `services.kit.auth.authenticator.Authenticator`."""

    @property
    def is_local(self) -> bool:
        """Return whether no credentials are required because only this machine reaches the service."""

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        """Return the principal of a caller, or raise `Problem`."""

    def is_valid(self, principal: Principal) -> bool:
        """Return whether its credentials are still valid, by the cached keys."""


def is_public(path: str) -> bool:
    """Return whether a path needs no credentials: the probes, the page and its assets, and the API's description."""
    return path in _PUBLIC or path.startswith(_PUBLIC_BELOW)


def entering(
    app: Any, authenticator: Authenticating, origins: Iterable[str] = (), limit: BodyLimit | None = None
) -> Any:
    """Wrap ``app`` (ASGI) in the middleware.

    A body announced as larger than ``limit``, or as encoded, is rejected before any other check.

    If only this machine reaches a service without credentials, cross-site browser requests are rejected, unless their
    origin is one of ``origins``: they would look like the user's own.
    """
    allowed = frozenset(origins)
    pages = CORSConfig(allow_origins=sorted(allowed)) if allowed else None

    async def entrance(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        public = is_public(scope["path"])
        send = _with_headers(send, (*(_HEADERS if public else _API_HEADERS), *_for_pages(scope, pages)))
        if limit is not None and scope["type"] == "http" and (refusal := refused_body(scope, limit)) is not None:
            await send_problem(send, refusal)
            return
        ticket = _take_ticket(scope)
        if not public:
            try:
                if authenticator.is_local:
                    _check_is_local(scope, allowed)
                principal = await authenticator.authenticate(_authorization(scope), ticket)
                scope[PRINCIPAL], scope[STILL_VALID] = principal, partial(authenticator.is_valid, principal)
            except Problem as problem:
                scope[PRINCIPAL] = problem
        await app(scope, receive, send)

    return entrance


def _authorization(scope: Any) -> str | None:
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) > 1:
        raise Problem(401, "there is more than one Authorization header", headers={"WWW-Authenticate": CHALLENGE})
    return found[0].decode("latin-1") if found else None


def _take_ticket(scope: Any) -> str | None:
    """Return the ticket in a URL, and remove it from the scope, so that it is never logged.

    Only streams and WebSockets may be opened with one.
    """
    query: bytes = scope.get("query_string", b"")
    if _TICKET.encode() not in query:
        return None
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    tickets = [value for name, value in pairs if name == _TICKET]
    if tickets:
        scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != _TICKET]).encode()
    is_stream = scope["type"] == "websocket" or (scope["method"] == "GET" and scope["path"].endswith(_STREAMS))
    return tickets[0] if len(tickets) == 1 and is_stream else None


def _check_is_local(scope: Any, allowed: frozenset[str]) -> None:
    """Reject cross-site browser requests, by their origin or by a rebound host name.

    Raises:
        Problem: 403.
    """
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    name = _host_of(f"//{host}")
    if host and not (is_loopback(name) or is_address(name)):
        raise Problem(
            403, "a service without credentials is called by its address or as localhost, not by another name"
        )
    origin = headers.get(b"origin", b"").decode("latin-1")
    own = origin.partition("://")[2] == host
    if origin and not (own or origin in allowed or is_loopback(_host_of(origin))):
        raise Problem(
            403, "pages of this origin may not call a service without credentials: see its setting cors_origins"
        )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _for_pages(scope: Any, pages: CORSConfig | None) -> tuple[tuple[bytes, bytes], ...]:
    """Return CORS headers for responses that do not come from the application, if the origin is allowed."""
    origin = dict(scope["headers"]).get(b"origin")
    if pages is None or origin is None or not pages.is_origin_allowed(origin.decode("latin-1")):
        return ()
    if pages.is_allow_all_origins:
        return ((b"access-control-allow-origin", b"*"),)
    return (
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-credentials", b"true"),
        (b"vary", b"Origin"),
    )


def _with_headers(send: Any, wanted: tuple[tuple[bytes, bytes], ...]) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {bytes(name).lower() for name, _ in headers}
            message = {**message, "headers": headers + [pair for pair in wanted if pair[0] not in present]}
        await send(message)

    return sending
