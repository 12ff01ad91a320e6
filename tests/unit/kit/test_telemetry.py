"""Test that logs contain no credentials."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.telemetry import scrub

SECRET = "abcDEF123_ghi-456"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"sk-{SECRET}", "***"),
        (f"key sk-proj-{SECRET} was refused", "key *** was refused"),
        (f"sk-ant-api03-{SECRET}", "***"),
        (f"sk-or-v1-{SECRET}", "***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"authorization: bearer {SECRET}", "authorization: bearer ***"),
        ("Bearer eyJhbGciOi.eyJzdWIi.c2ln+/=", "Bearer ***"),
        (f"x-api-key: {SECRET}", "x-api-key: ***"),
        (f'{{"api_key": "{SECRET}", "model": "m"}}', '{"api_key": "***", "model": "m"}'),
        (f"OPENAI_API_KEY={SECRET}", "OPENAI_API_KEY=***"),
        ("nats://user:secret@host:4222", "nats://***@host:4222"),
        ("postgresql+asyncpg://u:p%40ss@db:5432/x", "postgresql+asyncpg://***@db:5432/x"),
        ("one nats://a:b@c, two nats://d:e@f", "one nats://***@c, two nats://***@f"),
    ],
)
def test_credentials_are_replaced(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a risk-averse and task-oriented answer",
        "http://127.0.0.1:8080/v1/sessions/chat-1/events?after=t100abc",
        "gen_01HX completed after 1024 tokens",
        "mail me@example.org: hello",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text) == text


@given(st.text())
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


def logged(statement: str) -> dict[str, object]:
    script = (
        "import structlog\n"
        "from services.kit.telemetry import configure_logging\n"
        'configure_logging("billing", "info", "json")\n'
        "log = structlog.get_logger()\n" + statement
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    entry: dict[str, object] = json.loads(line)
    return entry


def test_a_log_line_is_json_with_service_level_and_time_and_without_credentials() -> None:
    entry = logged(f'log.warning("calling sk-{SECRET}", api_key="{SECRET}", url="http://u:p@h", tokens=7)')
    assert (entry["service"], entry["level"], entry["tokens"]) == ("billing", "warning", 7)
    assert str(entry["timestamp"]).endswith("Z")
    assert (entry["event"], entry["api_key"], entry["url"]) == ("calling ***", "***", "http://***@h")


def test_a_logged_exception_has_no_credentials() -> None:
    entry = logged(f'try:\n    raise OSError("nats://u:{SECRET}@h")\nexcept OSError:\n    log.exception("failed")\n')
    assert "OSError: nats://***@h" in str(entry["exception"])
    assert SECRET not in str(entry["exception"])


def test_lines_below_the_level_are_not_written() -> None:
    assert logged('log.debug("quiet")\nlog.info("loud")')["event"] == "loud"
