"""Test `tailrace up --cluster 3`: one nats-server is killed and all services continue."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.standalone.plan import Options, ServiceSpec, plan_services
from tests.acceptance.test_standalone_up import ANY_PORTS, Up
from tests.support.service_processes import REPOSITORY, clean_environment

pytestmark = pytest.mark.acceptance
QUESTION = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 300, "tokens_per_second": 20},
}


def asked(url: str, session: str) -> str:
    import httpx

    answer = httpx.post(f"{url}/v1/sessions/{session}/generations", json=QUESTION, timeout=30)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generation"])


def events(url: str, session: str, generation: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "services.standalone.cli", "tail", session, "--json", "--from", "start"]
    process = subprocess.Popen(
        [*command, "--url", url], cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(90, process.kill)
    timer.start()
    found = []
    assert process.stdout is not None
    for line in process.stdout:
        found.append(json.loads(line))
        if found[-1].get("type") in ("completed", "failed", "cancelled", "interrupted"):
            break
    timer.cancel()
    process.kill()
    process.wait()
    process.stdout.close()
    return found


def test_make_passes_the_number_of_brokers_on() -> None:
    shown = subprocess.run(
        ["make", "-n", "up", "CLUSTER=3"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "services.standalone.cli up --cluster 3" in shown.stdout


def test_a_killed_node_of_the_embedded_cluster_interrupts_no_answer(tmp_path: Path) -> None:
    started = Up(tmp_path, "--cluster", "3", *ANY_PORTS)
    try:
        shown = started.shown.read_text()
        assert len(re.findall(r"nats://127\.0\.0\.1:\d+", shown)) == 3
        url = started.address("page")
        generation = asked(url, "s")
        node = next(c for c in started.children if any(a.endswith("nats-2.conf") for a in c.cmdline()))
        node.send_signal(signal.SIGKILL)
        received = events(url, "s", generation)
        assert received[-1]["type"] == "completed", received[-1]
        assert [e["seq"] for e in received] == list(range(len(received)))
        assert (tmp_path / "data" / "nats-2").is_dir()
        assert started.interrupt() == 0
    finally:
        started.close()


def test_without_a_number_one_broker_is_started(tmp_path: Path) -> None:
    specs = planned(tmp_path, ())
    assert [s.name for s in specs if s.name.startswith("nats")] == ["nats-server"]
    assert "TAILRACE_REPLICAS" not in specs[-1].env


def test_a_cluster_is_planned_with_folders_ports_and_replicas_of_its_own(tmp_path: Path) -> None:
    specs = planned(tmp_path, (4223, 4224))
    assert [s.name for s in specs if s.name.startswith("nats")] == ["nats-1", "nats-2", "nats-3"]
    assert [s.ready for s in specs[:3]] == [f"nats://127.0.0.1:{port}" for port in (4222, 4223, 4224)]
    assert specs[-1].env["TAILRACE_NATS_URL"] == ",".join(s.ready for s in specs[:3])
    assert {s.env["TAILRACE_REPLICAS"] for s in specs} == {"3"}
    assert planned(tmp_path, (4223, 4224), TAILRACE_REPLICAS="1")[-1].env["TAILRACE_REPLICAS"] == "1"


def planned(folder: Path, nodes: tuple[int, ...], **env: str) -> list[ServiceSpec]:
    options = Options(
        data=folder, delivery_port=1, grpc_port=4, billing_port=2, producer_ports=(3,), nats_port=4222, node_ports=nodes
    )
    return plan_services(options, env, {}, "/nats-server")
