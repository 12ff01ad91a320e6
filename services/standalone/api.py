"""HTTP client of the services for the command line."""

import os
import uuid
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import httpx
import msgspec

from services.standalone.errors import CommandFailed, Refused, Unreachable

__all__ = ["Accepted", "Api", "refusal"]

T = TypeVar("T")
_DEAD: Final = "/v1/requests/dead"
_KEYS: Final = "/v1/keys"
DELETING_SECONDS: Final = 60.0
"""Timeout of a deletion: it waits for the cancelled generations and for billing."""
_NO_ROUTE: Final = "Not Found"
"""The detail of a problem for a path that the service does not serve."""
_ADDRESS_OPTIONS: Final = {"delivery": "--url, TAILRACE_URL", "billing": "--billing-url, TAILRACE_BILLING_URL"}
Service = Literal["delivery", "billing"]
_TIMEOUT = httpx.Timeout(15.0, connect=5.0)


class Accepted(msgspec.Struct, frozen=True):
    """A queued generation. ``cursor``: the position just before its first event."""

    session: str
    generation: str
    cursor: str | None = None


class Api:
    """Client of one service at ``url``. Methods raise `Refused` for a problem and `Unreachable` when nothing answers.

    ``key``: the API key or token to send; the variable ``TAILRACE_KEY`` when omitted.
    """

    service: Service = "delivery"

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        key = key or os.environ.get("TAILRACE_KEY")
        headers = {"user-agent": "tailrace-cli"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.client = httpx.Client(base_url=self.url, timeout=_TIMEOUT, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.client.close()

    def ask(self, session: str, body: dict[str, Any], idempotency_key: str | None = None) -> Accepted:
        """Request a generation; return its name and the cursor to read it from.

        Repeat the request once when the response is lost. The idempotency key (random by default) stays the same, so
        nothing is generated twice.
        """
        headers = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
        path = f"/v1/sessions/{session}/generations"
        try:
            try:
                answer = self.client.post(path, json=body, headers=headers)
            except (httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout):
                answer = self.client.post(path, json=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.url, error) from error
        return self._content(answer, Accepted)

    def cancel(self, session: str, generation: str) -> dict[str, Any]:
        """Cancel a generation; return its ``generation`` and ``state``. An ended generation stays as it is."""
        return self._object("POST", f"/v1/sessions/{session}/generations/{generation}/cancel")

    def session(self, session: str) -> dict[str, Any]:
        """Return a session and its generations."""
        return self._object("GET", f"/v1/sessions/{session}")

    def delete_session(self, session: str, *, cancel: bool) -> None:
        """Delete a session; with ``cancel`` first cancel its queued and running generations."""
        query = {"cancel": "true"} if cancel else {}
        answer = self._send("DELETE", f"/v1/sessions/{session}", params=query, timeout=DELETING_SECONDS)
        if answer.is_error:
            raise refusal(answer, self.service)

    def sessions(self, limit: int) -> list[dict[str, Any]]:
        """Return at most ``limit`` sessions, page by page."""
        return self._pages("/v1/sessions", "sessions", limit)

    def dead(self, limit: int) -> list[dict[str, Any]]:
        """Return at most ``limit`` dead requests, oldest first, page by page."""
        return self._pages(_DEAD, "requests", limit)

    def dead_request(self, generation: str) -> dict[str, Any]:
        """Return a dead request with its content."""
        return self._object("GET", f"{_DEAD}/{generation}")

    def resend(self, generation: str) -> dict[str, Any]:
        """Send a dead request again; return its ``session`` and new ``generation``."""
        return self._object("POST", f"{_DEAD}/{generation}/resend")

    def drop(self, generation: str) -> None:
        """Remove a dead request permanently."""
        self._remove(f"{_DEAD}/{generation}")

    def create_key(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Create an API key; return it with its secret in ``key``."""
        return self._object("POST", _KEYS, json=spec)

    def keys(self) -> list[dict[str, Any]]:
        """Return the API keys without their secrets."""
        rows: list[dict[str, Any]] = self._object("GET", _KEYS).get("keys", [])
        return rows

    def revoke_key(self, key: str) -> None:
        """Revoke an API key."""
        self._remove(f"{_KEYS}/{key}")

    def is_open(self) -> bool:
        """Return whether the service accepts callers without credentials."""
        answer = self._send("GET", "/v1/sessions", params={"limit": "1"}, headers={"authorization": ""})
        return answer.is_success

    def _pages(self, path: str, name: str, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            query = {"limit": str(min(limit - len(found), 100))} | ({"after": after} if after else {})
            page = self._object("GET", path, params=query)
            found += page.get(name, [])
            after = page.get("next")
            if not after or len(found) >= limit:
                return found[:limit]

    def _content(self, response: httpx.Response, type_: type[T]) -> T:
        if response.is_error:
            raise refusal(response, self.service)
        try:
            return msgspec.json.decode(response.content, type=type_)
        except msgspec.DecodeError as error:
            raise CommandFailed(f"{response.url} does not answer like Tailrace: {error}") from error

    def _remove(self, path: str) -> None:
        answer = self._send("DELETE", path)
        if answer.is_error:
            raise refusal(answer, self.service)

    def _object(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._content(self._send(method, path, **kwargs), dict[str, Any])

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self.client.request(method, path, **kwargs)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.url, error) from error


def refusal(response: httpx.Response, service: Service = "delivery") -> Refused:
    """Return the error for an HTTP error response, whose body must have been read.

    ``service``: the service expected at this address; the error text of an unknown path names it.
    """
    try:
        problem = msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.DecodeError:
        problem = {}
    path = response.request.url.path
    if response.status_code == HTTPStatus.NOT_FOUND and ("type" not in problem or problem.get("detail") == _NO_ROUTE):
        origin = str(response.request.url.copy_with(path="/", query=None, fragment=None)).rstrip("/")
        return Refused(
            response.status_code,
            f"{origin} does not serve {path}",
            f"is it the address of {service}? ({_ADDRESS_OPTIONS[service]})",
            "no-route",
        )
    return Refused(
        response.status_code,
        str(problem.get("title") or f"HTTP {response.status_code}"),
        str(problem.get("detail") or ""),
        str(problem.get("type") or "").rpartition(":")[2],
    )


def unreachable(url: str, error: Exception) -> CommandFailed:
    """Return the error to show for a failed connection to ``url``."""
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return CommandFailed(f"{url!r} is not a valid address: {error}")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(f"nothing answers at {url}: check that `tailrace up` is running and the address is right")
    return Unreachable(f"the connection to {url} was lost: {error or type(error).__name__}")
