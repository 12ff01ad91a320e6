"""`tailrace up --cluster 3`: one of its nats-servers dies by hand, and everything goes on."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.acceptance.processes import REPOSITORY, clean_environment
from tests.acceptance.test_standalone_up import ANY_PORTS, Up

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
