"""Test `tailrace up` on a disk that fills up during an answer and is freed: all services recover by themselves."""

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.test_standalone_up import ANY_PORTS, up
from tests.conftest import require

pytestmark = pytest.mark.acceptance
SIZE = 160
HEALS_WITHIN = 60.0
"""Seconds after which all must be well again once there is space: the docs say so."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tailrace-test", str(folder)]
    made = shutil.which("mount") and subprocess.run(command, check=False, capture_output=True).returncode == 0
    require(made, "a file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(path: Path) -> None:
    block = b"\0" * 65_536
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(block):
            continue


def until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.2)
    return value


class Client:
    """Clients of a Tailrace that may refuse everything."""

    def __init__(self, page: str, billing: str, producer: str) -> None:
        self.page = page
        self.billing = billing
        self.producer = producer
        self.http = httpx.Client(timeout=20)

    def start(self, **params: object) -> httpx.Response:
        body = {"model": "scripted/story", "messages": [{"role": "user", "content": "rivers"}], "params": params}
        return self.http.post(f"{self.page}/v1/sessions/s/generations", json=body)

    def records(self) -> dict[str, str]:
        listed = self.http.get(f"{self.page}/v1/sessions/s").json()
        return {one["generation"]: one["state"] for one in listed["generations"]}

    def ready(self) -> list[int]:
        found = []
        for url in (self.page, self.billing, self.producer):
            try:
                found.append(self.http.get(f"{url}/readyz").status_code)
            except httpx.HTTPError:
                found.append(0)
        return found

    def usage(self) -> dict[str, int]:
        listed = self.http.get(f"{self.billing}/v1/usage/sessions/s").json()["generations"]
        return {one["generation"]: one["counted"]["output"] for one in listed if one["state"] != "running"}


def test_services_recover_when_a_full_disk_has_space_again(disk: Path, tmp_path: Path) -> None:
    with up(tmp_path / "up", *ANY_PORTS, "--data", str(disk / "data")) as running:
        page, billing, producer = re.findall(r"(http://[\d.:]+)/metrics", running.shown.read_text())
        client = Client(page, billing, producer)
        before = client.start(tokens=20, tokens_per_second=200).json()["generation"]
        until(lambda: client.records().get(before) == "completed", 20)
        cut = client.start(tokens=900, tokens_per_second=30).json()["generation"]
        until(lambda: client.records().get(cut) == "running", 20)
        fill(disk / "fill")

        answers: list[httpx.Response] = []
        deadline = time.monotonic() + 60
        while sum(answer.status_code == 503 for answer in answers) < 5:  # some still find place in a half full page
            assert time.monotonic() < deadline, running.shown.read_text()[-3_000:]
            starts = [threading.Thread(target=lambda: answers.append(client.start())) for _ in range(5)]
            for thread in starts:
                thread.start()
            for thread in starts:
                thread.join(40)
        accepted = {answer.json()["generation"] for answer in answers if answer.status_code == 202}
        assert {answer.status_code for answer in answers} <= {202, 503}
        until(lambda: client.ready() == [503, 503, 503], 30)
        until(lambda: "the disk of" in running.shown.read_text(), 30)
        assert client.start().json()["type"] == "urn:tailrace:problem:log-refuses"

        (disk / "fill").unlink()
        freed = time.monotonic()
        until(lambda: client.ready() == [200, 200, 200], HEALS_WITHIN)
        answer = until(lambda: (a := client.start(tokens=20, tokens_per_second=200)).status_code == 202 and a, 10)
        after = answer.json()["generation"]
        until(lambda: client.records().get(after) == "completed", 20)
        until(lambda: client.records().get(cut) in ("completed", "interrupted"), HEALS_WITHIN)
        known = {before, cut, after, *accepted}
        until(lambda: set(client.records()) == known, HEALS_WITHIN)
        until(lambda: set(client.records().values()) <= {"completed", "interrupted"}, HEALS_WITHIN)
        assert time.monotonic() - freed < 2 * HEALS_WITHIN
        until(lambda: set(client.usage()) == known, 30)
        assert running.interrupt() == 0
