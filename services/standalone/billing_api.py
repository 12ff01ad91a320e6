"""HTTP client of billing for the command line."""

from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from services.standalone.api import Api, Service, refusal

__all__ = ["BillingApi", "given"]


class BillingApi(Api):
    """Client of billing."""

    service: Service = "billing"

    def get(self, path: str, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return a report."""
        return self._object("GET", path, params=given(query))

    def text(self, path: str, query: Mapping[str, Any], media: str = "text/csv") -> httpx.Response:
        """Return a report in the media type ``media``."""
        answer = self._send("GET", path, params=given(query), headers={"accept": media})
        if answer.is_error:
            raise refusal(answer, self.service)
        return answer

    def pages(self, path: str, query: Mapping[str, Any], name: str, limit: int) -> list[dict[str, Any]]:
        """Return at most ``limit`` rows of a report, page by page."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            size = min(limit - len(found), 1_000)
            page = self.get(path, {**query, "limit": size, "cursor": cursor})
            found += page.get(name, [])
            cursor = page.get("next")
            if not cursor or len(found) >= limit:
                return found[:limit]

    def csv_pages(self, path: str, query: Mapping[str, Any], limit: int) -> Iterable[str]:
        """Yield the CSV lines of a report, page by page, with one header."""
        left, url = limit, path
        params: Mapping[str, Any] | None = {**query, "limit": min(limit, 1_000)}
        while True:
            answer = self.text(url, params or {})
            lines = answer.text.splitlines()
            yield from lines[: left + 1] if left == limit else lines[1 : left + 1]
            left -= len(lines) - 1
            following = answer.links.get("next", {}).get("url")
            if not following or left <= 0:
                return
            url, params = following, None

    def send(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """Send a change; return the response document."""
        return self._object(method, path, **kwargs)

    def remove(self, path: str) -> None:
        """Delete the resource at ``path``."""
        self._remove(path)


def given(query: Mapping[str, Any]) -> dict[str, Any]:
    """Return a query or body without its empty values."""
    return {name: value for name, value in query.items() if value not in (None, (), [])}
