"""Test both OpenAPI documents with schemathesis: responses conform to them and no request causes a server error."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.kit.jetstream.broker import Broker
from tests.integration.pipeline.test_auth_matrix import billing
from tests.support.credentials import ADMIN, guarded
from tests.support.delivery_server import Stage

EXAMPLES = 3
SECONDS = 60
CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "ignored_auth",
        "use_after_free",
        "unsupported_method",
    ]
)
STREAMS = r"/(events|live)$"  # they do not end


async def fuzz(document: str, folder: Path, *options: str) -> str:
    """Run schemathesis against a running service and return its failures, empty when there are none."""
    command = [
        *(sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"),
        *("run", document, "--header", f"Authorization: Bearer {ADMIN.text}"),
        *("--checks", CHECKS, "--max-examples", str(EXAMPLES), "--generation-deterministic"),
        *("--phases", "examples,coverage,fuzzing", "--workers", "1", "--max-time", str(SECONDS), "--no-shrink"),
        *("--exclude-path-regex", STREAMS, "--warnings", "off", "--no-color"),
        *("--continue-on-failure", "--request-timeout", "20", *options),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), SECONDS + 120)
    return "" if process.returncode == 0 else output.decode(errors="replace")


@pytest.fixture
async def stage(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_url, tmp_path, wait=0.5) as running:
        yield running


async def test_delivery_conforms_to_its_openapi_document(stage: Stage, tmp_path: Path) -> None:
    found = await fuzz(f"{stage.url}/docs/openapi.json", tmp_path)
    assert not found, found[-12_000:]


async def test_billing_conforms_to_its_openapi_document(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with billing(broker, nats_url, tmp_path) as url:
        found = await fuzz(f"{url}/docs/billing/openapi.json", tmp_path)
    assert not found, found[-12_000:]
