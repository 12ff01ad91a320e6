"""Requests of many megabytes, on the broker that `tailrace up` runs: from the client to the provider."""

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.processes import free_port
from schemas.requests import ENVELOPE, LARGEST_PAYLOAD
from services.delivery.requests.size_limit import request_limit
from services.delivery.settings import Settings
from services.kit.problem import MEDIA_TYPE
from services.standalone.embedded import MAX_PAYLOAD, payload_for, render_config
from tests.conftest import eventually, nats_server_path
from tests.support.delivery_server import Stage, delivering
from tests.support.openai_answers import config, saying
from tests.support.producer_worker import producing
from tests.support.provider_server import providing
from tests.support.websocket_client import socket

MB = 1024 * 1024
DEFAULT = Settings().max_body


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    (tmp_path / "nats.conf").write_text(render_config(port, tmp_path / "nats"))
    argv = [nats_server_path(), "-c", str(tmp_path / "nats.conf")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"nats://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


@pytest.fixture
async def stage(nats_url: str) -> AsyncIterator[Stage]:
    async with delivering(nats_url) as running:
        yield running


def picture(size: int) -> dict[str, Any]:
    """Return a request with a picture whose JSON has exactly so many bytes."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    part["image_url"] = {"url": "data:image/png;base64," + "A" * (size - len(json.dumps(body)))}
    return body


async def post(stage: Stage, body: dict[str, Any]) -> httpx.Response:
    data = json.dumps(body).encode()
    url = f"{stage.url}/v1/sessions/s/generations"
    return await stage.http.post(url, content=data, headers={"Content-Type": "application/json"})


async def test_a_request_of_the_default_limit_reaches_the_provider(stage: Stage) -> None:
    body = picture(DEFAULT)
    async with providing(saying("a river")) as provider:
        async with producing(stage.broker, config=config(provider.url)):
            answer = await post(stage, body)
            assert answer.status_code == 202, answer.text
            url = f"{stage.url}{answer.json()['links']['generation']}"

            async def ended() -> bool:
                return bool((await stage.http.get(url)).json()["state"] == "completed")

            await eventually(ended, timeout=60)
        assert provider.asked[0].body["messages"] == body["messages"]


async def test_a_request_beyond_the_default_limit_names_limit_and_setting(stage: Stage) -> None:
    answer = await post(stage, picture(DEFAULT + 1))
    assert (answer.status_code, answer.headers["content-type"]) == (413, MEDIA_TYPE)
    assert f"at most {DEFAULT} bytes" in answer.json()["detail"]
    assert "TAILRACE_DELIVERY_MAX_BODY" in answer.json()["detail"]


async def test_a_socket_takes_a_message_of_the_limit_and_no_larger_one(stage: Stage) -> None:
    def message(size: int) -> str:
        def whole(body: dict[str, Any]) -> str:
            return json.dumps({"type": "start", "id": 1, "session": "s", "request": body})

        return whole(picture(size - len(whole({})) + 2))

    async with socket(stage.url) as client:
        await client.connection.send(message(DEFAULT))
        assert (await client.hear("accepted"))["id"] == 1
        await client.connection.send(message(DEFAULT + 1))
        code, reason = await client.closed()
    assert code == 1009
    assert reason == f"a message has at most {DEFAULT} bytes: TAILRACE_DELIVERY_MAX_BODY sets the limit"


def test_the_embedded_broker_accepts_every_body_that_delivery_accepts() -> None:
    assert MAX_PAYLOAD >= DEFAULT + ENVELOPE
    assert request_limit(DEFAULT, MAX_PAYLOAD).size == DEFAULT
    for max_body in (0, 1_024, DEFAULT, 30 * MB, LARGEST_PAYLOAD - ENVELOPE):
        assert request_limit(max_body, payload_for(max_body)).size == max_body
        assert payload_for(max_body) <= LARGEST_PAYLOAD
