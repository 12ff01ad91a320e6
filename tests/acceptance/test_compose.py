"""Test the running deployment of ``compose.yaml``: two delivery replicas behind the edge, PostgreSQL, billing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.processes import free_port
from tests.conftest import eventually, require
from tests.support.service_processes import REPOSITORY, Subscriber, log_events, text_of

# Building the image and starting everything takes minutes on a small machine.
pytestmark = [pytest.mark.compose, pytest.mark.acceptance, pytest.mark.timeout(1_500)]

REQUEST = {"model": "scripted/story", "messages": [{"role": "user", "content": "Tell me a story."}]}


class Deployment:
    """The containers of ``docker compose up``: the edge on free ports, the replicas by their containers' addresses."""

    def __init__(self, project: str = "tailrace-test", **variables: str) -> None:
        self.project = project
        self.http = f"http://127.0.0.1:{free_port()}"
        self.http2 = f"http://127.0.0.1:{free_port()}"
        self._env = os.environ | {
            "COMPOSE_PROJECT_NAME": project,
            "EDGE_HTTP_PORT": self.http.rpartition(":")[2],
            "EDGE_HTTP2_PORT": self.http2.rpartition(":")[2],
            "EDGE_HTTPS_PORT": str(free_port()),
            **variables,
        }

    def compose(self, *args: str, seconds: float = 120) -> str:
        return self._run("compose", *args, seconds=seconds)

    def docker(self, *args: str) -> str:
        return self._run(*args, seconds=60)

    def _run(self, *args: str, seconds: float) -> str:
        done = subprocess.run(
            ["docker", *args],
            check=False,
            cwd=REPOSITORY,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"docker {' '.join(args)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-a", "-q", service).split()

    def replicas(self) -> list[str]:
        """Addresses of the delivery containers in the edge's network."""
        inspected = json.loads(self.docker("inspect", *self.containers("delivery")))
        networks = [container["NetworkSettings"]["Networks"] for container in inspected]
        return [f"http://{n[f'{self.project}_front']['IPAddress']}:8080" for n in networks]

    def ask(self, session: str) -> str:
        answer = httpx.post(f"{self.http}/v1/sessions/{session}/generations", json=REQUEST, timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["generation"])


def docker_answers() -> bool:
    """Whether an engine with compose is there."""
    if shutil.which("docker") is None:
        return False
    checks = (["docker", "version"], ["docker", "compose", "version"])
    return all(subprocess.run(c, check=False, capture_output=True, timeout=30).returncode == 0 for c in checks)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    require(docker_answers(), "no Docker engine with compose answers")
    started = Deployment()
    try:
        started.compose("up", "--build", "--wait", "--wait-timeout", "180", "-d", seconds=900)
        yield started
    finally:
        sys.stdout.write(started.compose("logs", "--no-color", "--tail", "40"))
        started.compose("down", "--volumes", "--timeout", "30")


def test_two_replicas_and_the_edge_show_the_same_text(deployment: Deployment) -> None:
    first, second = deployment.replicas()
    generation = deployment.ask("shared")
    path = f"/v1/sessions/shared/events?generation={generation}"
    readers = [Subscriber(base + path) for base in (first, second, deployment.http)]
    texts = [text_of(reader.read_to_the_end()) for reader in readers]
    assert len(texts[0]) > 100
    assert texts == [texts[0]] * 3
    shown = httpx.get(f"{deployment.http}/v1/sessions/shared/generations/{generation}").json()
    assert (shown["state"], shown["text"]) == ("completed", texts[0])


def test_the_edge_serves_a_stream_over_http_2(deployment: Deployment, tmp_path: Path) -> None:
    require(shutil.which("curl"), "curl is not installed")
    generation = deployment.ask("over-h2")
    url = f"/v1/sessions/over-h2/events?generation={generation}"
    written = "%{stderr}%{http_version} %{http_code}"
    curl = ["curl", "-sSN", "--max-time", "120", "--http2-prior-knowledge", "-w", written, deployment.http2 + url]
    done = subprocess.run(curl, check=False, capture_output=True, text=True, timeout=130)
    assert (done.returncode, done.stderr) == (0, "2 200")
    events = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: ")]
    plain = Subscriber(deployment.http + url).read_to_the_end()
    assert events == log_events(plain)


def test_the_edge_passes_tokens_on_while_the_answer_still_runs(deployment: Deployment) -> None:
    generation = deployment.ask("unbuffered")
    reader = Subscriber(f"{deployment.http}/v1/sessions/unbuffered/events?generation={generation}")
    got = reader.read(5)
    shown = httpx.get(f"{deployment.http}/v1/sessions/unbuffered/generations/{generation}").json()
    assert shown["state"] == "running"
    assert [event["type"] for event in log_events(got)] == ["started"] + ["delta"] * 4
    assert log_events(reader.read_to_the_end())[-1]["type"] == "completed"


async def test_the_edge_balances_over_both_replicas(deployment: Deployment) -> None:
    replicas = deployment.replicas()
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{deployment.http}/v1/sessions/balanced/generations", json=REQUEST)
        assert answer.status_code == 202

        async def subscribers() -> list[float]:
            return [_metric((await client.get(f"{r}/metrics")).text, "tailrace_delivery_subscribers") for r in replicas]

        async def one_more() -> bool:
            readers.append(Subscriber(f"{deployment.http}/v1/sessions/balanced/events"))
            return min(await subscribers()) > 0

        readers: list[Subscriber] = []
        try:
            assert await eventually(one_more, timeout=30, interval=0.5)
        finally:
            for reader in readers:
                reader.kill()


def _metric(text: str, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
    )


async def test_billing_settles_the_generation_in_postgresql(deployment: Deployment) -> None:
    generation = deployment.ask("billed")
    events = Subscriber(f"{deployment.http}/v1/sessions/billed/events?generation={generation}").read_to_the_end()
    async with httpx.AsyncClient(timeout=30) as client:

        async def settled() -> dict[str, Any] | None:
            usage = await client.get(f"{deployment.http}/v1/usage/generations/{generation}")
            return usage.json() if usage.status_code == 200 and usage.json()["status"] == "matched" else None

        row = await eventually(settled, timeout=30, interval=0.2)
    [terminal] = [event for event in log_events(events) if event["type"] == "completed"]
    assert row["counted"]["output"] == terminal["counted"]["output"] > 0
    count = "select count(*) from information_schema.tables where table_schema = 'public'"
    psql = (
        "exec",
        "-T",
        "postgres",
        "psql",
        "-h",
        "/run/postgresql",
        "-U",
        "tailrace",
        "-d",
        "tailrace",
        "-tAc",
        count,
    )
    assert int(deployment.compose(*psql)) > 1


def test_the_edge_keeps_the_services_own_probes_to_itself(deployment: Deployment) -> None:
    assert httpx.get(f"{deployment.http}/healthz").json() == {"status": "ok"}
    for name in ("metrics", "readyz"):
        for spelling in (f"/{name}", f"/{name}/", f"/{name}%2f", f"//{name}", f"/v1/..%2f{name}"):
            assert httpx.get(deployment.http + spelling).status_code == 404, spelling


def test_billing_and_documentation_are_there_behind_the_edge(deployment: Deployment) -> None:
    paths = ["usage", "ledger", "budgets", "statements/2026-01", "prices", "reconciliations"]
    for path in paths:
        assert httpx.get(f"{deployment.http}/v1/{path}").status_code == 200, path
    assert httpx.post(f"{deployment.http}/v1/provider-usage", json=[]).status_code == 200
    for path, title in (("/docs", "Tailrace delivery"), ("/docs/billing", "Tailrace billing")):
        assert f"<title>{title}</title>" in httpx.get(deployment.http + path).text


def test_a_15_megabyte_image_is_accepted_and_a_larger_body_is_refused_with_limit_and_setting(
    deployment: Deployment,
) -> None:
    def body(size: int) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
        return REQUEST | {"messages": [{"role": "user", "content": [part]}]}

    url = f"{deployment.http}/v1/sessions/large/generations"
    assert httpx.post(url, json=body(15 * 1024 * 1024), timeout=60).status_code == 202
    refused = httpx.post(url, json=body(17 * 1024 * 1024), timeout=60)
    assert refused.status_code == 413
    assert "at most 16777216 bytes" in refused.json()["detail"]
    assert "TAILRACE_DELIVERY_MAX_BODY" in refused.json()["detail"]


def test_a_replica_that_is_killed_leaves_its_reader_able_to_resume_elsewhere(deployment: Deployment) -> None:
    victim, other = deployment.containers("delivery")
    addresses = dict(zip(deployment.containers("delivery"), deployment.replicas(), strict=True))
    generation = deployment.ask("survivor")
    path = f"/v1/sessions/survivor/events?generation={generation}"
    steady, unlucky = Subscriber(addresses[other] + path), Subscriber(addresses[victim] + path)
    before = unlucky.read(8)
    deployment.docker("kill", "--signal", "KILL", victim)
    unlucky.kill()
    resumed = Subscriber(deployment.http + path, last_id=before[-1]["id"])
    after = resumed.read_to_the_end()
    assert text_of(before) + text_of(after) == text_of(steady.read_to_the_end())
    deployment.docker("start", victim)


def test_every_service_runs_without_root_and_stops_with_exit_code_0(deployment: Deployment) -> None:
    ours = [c for service in ("producer", "delivery", "billing") for c in deployment.containers(service)]
    assert {deployment.docker("exec", c, "id", "-u").strip() for c in ours} == {"10001"}
    # One that was killed before may just be starting again: as process 1 it hears no signal until it has asked for it.
    deployment.compose("up", "--no-recreate", "--wait", "--wait-timeout", "120", "-d", seconds=180)
    deployment.compose("stop", "producer", "delivery", "billing")
    states = [container["State"] for container in json.loads(deployment.docker("inspect", *ours))]
    assert [state["ExitCode"] for state in states] == [0] * len(ours)
