"""Test the running profile `cluster` of ``compose.yaml``: three brokers, one of which is lost during an answer."""

import json
import os
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.acceptance.test_compose import Deployment, docker_answers
from tests.conftest import eventually, require
from tests.support.service_processes import REPOSITORY, Subscriber, log_events, text_of

pytestmark = [pytest.mark.compose, pytest.mark.acceptance, pytest.mark.timeout(1_500)]

NODES = ("nats-1", "nats-2", "nats-3")
STORY = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "params": {"tokens": 200, "tokens_per_second": 10},
}


# What is tested here is the log: nobody but this test reaches the replicas, so they need no credentials.
OPEN = "services:\n  delivery:\n    environment:\n      TAILRACE_AUTH: insecure\n"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Run brokers, producer and delivery; edge and billing are tested without the profile."""
    require(docker_answers(), "no Docker engine with compose answers")
    override = tmp_path_factory.mktemp("compose") / "open.yaml"
    override.write_text(OPEN)
    files = os.environ.get("COMPOSE_FILE", str(REPOSITORY / "compose.yaml"))
    started = Deployment(
        "tailrace-cluster",
        COMPOSE_FILE=f"{files}{os.pathsep}{override}",
        COMPOSE_PROFILES="cluster",
        TAILRACE_NATS_URL=",".join(f"nats://tailrace:tailrace-local@{node}:4222" for node in NODES),
        TAILRACE_REPLICAS="3",
    )
    parts = (*NODES, "producer", "delivery")
    try:
        started.compose("up", "--build", "--wait", "--wait-timeout", "180", "-d", *parts, seconds=900)
        yield started
    finally:
        sys.stdout.write(started.compose("logs", "--no-color", "--tail", "40"))
        started.compose("down", "--volumes", "--timeout", "30")


def leader(deployment: Deployment, stream: str) -> str:
    url = "http://127.0.0.1:8222/jsz?accounts=true&streams=true"
    answer = json.loads(deployment.compose("exec", "-T", NODES[0], "wget", "-q", "-O", "-", url))
    details = [d for account in answer["account_details"] for d in account.get("stream_detail", [])]
    (found,) = [d["cluster"] for d in details if d["name"] == stream]
    assert len(found["replicas"]) == 2, found
    return str(found["leader"])


async def test_an_answer_continues_when_the_leader_of_its_log_is_lost(deployment: Deployment) -> None:
    first, second = deployment.replicas()
    answer = httpx.post(f"{first}/v1/sessions/s/generations", json=STORY, timeout=30)
    assert answer.status_code == 202, answer.text
    path = f"/v1/sessions/s/events?generation={answer.json()['generation']}"
    readers = [Subscriber(base + path) for base in (first, second)]
    heard = [reader.read(8) for reader in readers]
    lost = leader(deployment, "TOKENS_0")
    deployment.compose("kill", lost)
    texts = []
    for lines, reader in zip(heard, readers, strict=True):
        events = log_events([*lines, *reader.read_to_the_end()])
        assert [event["seq"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "completed"
        texts.append("".join(event.get("text") or "" for event in events))
    assert texts[0] == texts[1]
    deployment.compose("start", lost)

    async def all_answer() -> bool:
        return all((httpx.get(f"{base}/readyz", timeout=5)).status_code == 200 for base in (first, second))

    await eventually(all_answer, timeout=60, interval=0.5)
    again = httpx.post(f"{second}/v1/sessions/s/generations", json=STORY | {"params": {"tokens": 5}}, timeout=30)
    assert again.status_code == 202, again.text
    late = Subscriber(f"{first}/v1/sessions/s/events?generation={again.json()['generation']}")
    assert text_of(late.read_to_the_end())
