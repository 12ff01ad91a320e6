"""Test content negotiation."""

import pytest

from services.delivery.formats.negotiation import negotiate

OFFERED = ["text/event-stream", "application/x-ndjson", "application/json"]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, "text/event-stream"),
        ("", "text/event-stream"),
        ("*/*", "text/event-stream"),
        (BROWSER, "text/event-stream"),
        ("application/*", "application/x-ndjson"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON", "application/json"),
        ("application/json; charset=utf-8", "application/json"),
        ("text/event-stream;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("text/event-stream;q=0, */*", "application/x-ndjson"),
        ("application/json;q=0.2, application/*;q=0.7", "application/x-ndjson"),
        ("application/x-ndjson;q=nonsense, application/json;q=0.1", "application/json"),
        ("text/html", None),
        ("*/*;q=0", None),
        ("text", None),
        (",,;,", None),
    ],
)
def test_the_format_is_the_one_the_client_prefers(accept: str | None, wanted: str | None) -> None:
    assert negotiate(accept, OFFERED) == wanted
