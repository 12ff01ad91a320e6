"""Stopping `tailrace up` while an answer runs, and while its broker is frozen."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.kit.shutdown import MARGIN
from services.standalone.plan import BEYOND_MARGIN, BROKER_GRACE, DRAIN
from tests.acceptance.test_standalone_up import ANY_PORTS, Up

pytestmark = pytest.mark.acceptance
LOADED = 10.0
"""Seconds more that a busy machine may take."""
ENDLESS = {"tokens": 20, "stall_after": 2, "tokens_per_second": 1_000}


def start_an_answer(up: Up) -> str:
    """Start an answer that stalls, wait for its first words, and return the path of its lookup."""
    body = {"model": "scripted/stall", "messages": [{"role": "user", "content": "rivers"}], "params": ENDLESS}
    page = up.address("page")
    request = urllib.request.Request(
        f"{page}/v1/sessions/s/generations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        generation = json.load(answer)["generation"]
    path = f"/v1/sessions/s/generations/{generation}"
    eventually(lambda: look_up(up, path)["state"] == "running")
    return path


def look_up(up: Up, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(up.address("page") + path, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + seconds, "did not become true in time"
        time.sleep(0.05)
    return time.monotonic() - begun


def test_ctrl_c_names_the_draining_service_and_the_next_start_interrupts_the_cut_answer(tmp_path: Path) -> None:
    up = Up(tmp_path, *ANY_PORTS)
    try:
        path = start_an_answer(up)
        begun = time.monotonic()
        assert up.interrupt() == 0
        assert time.monotonic() - begun < DRAIN + MARGIN + LOADED
        shown = up.shown.read_text()
        assert "waiting for producer, 8 s at most (Ctrl-C again to stop at once)" in shown
        assert "producer: waiting for running answers to end  count=1 seconds=2.0" in shown
        assert "producer: running answers interrupted and handed over  count=1" in shown
        assert "killed" not in shown
    finally:
        up.close()
    again = Up(tmp_path, *ANY_PORTS)
    try:
        seconds = eventually(lambda: look_up(again, path)["state"] == "interrupted")
        assert seconds < 10, "the lease of 15 s was not waited for"
    finally:
        again.interrupt()
        again.close()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    up = Up(tmp_path, *ANY_PORTS)
    try:
        start_an_answer(up)
        os.killpg(up.process.pid, signal.SIGINT)
        eventually(lambda: "waiting for producer" in up.shown.read_text())
        begun = time.monotonic()
        assert up.interrupt() == 0
        assert time.monotonic() - begun < LOADED
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in up.children)
    finally:
        up.close()


def test_everything_stops_while_the_broker_is_frozen(tmp_path: Path) -> None:
    up = Up(tmp_path, *ANY_PORTS)
    try:
        start_an_answer(up)
        (broker,) = (child for child in up.children if "nats-server" in child.name())
        broker.suspend()
        begun = time.monotonic()
        assert up.interrupt() == 0
        services = 2 * (DRAIN + MARGIN + BEYOND_MARGIN)
        assert time.monotonic() - begun < services + BROKER_GRACE + LOADED
        shown = up.shown.read_text()
        assert [line for line in shown.splitlines() if "killed" in line] == [
            f"nats-server did not end within {BROKER_GRACE:g} s and is killed"
        ]
    finally:
        up.close()
