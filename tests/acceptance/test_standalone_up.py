"""`tailrace up` with the real services: asked, stopped, started again, killed."""

import contextlib
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.service_processes import REPOSITORY, clean_environment

pytestmark = pytest.mark.acceptance
ANY_PORTS = ("--port", "0", "--grpc-port", "0", "--billing-port", "0", "--producer-port", "0", "--nats-port", "0")


def tailrace(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.standalone.cli", *argv]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Up:
    """A `tailrace up` process with its own terminal; its output goes to a file."""

    def __init__(self, folder: Path, *argv: str) -> None:
        self.shown = folder / "shown"
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "services.standalone.cli", "up", "--data", str(folder / "data"), *argv]
        with self.shown.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=clean_environment(),
                stdin=theirs,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0,  # the most that any user may have; see the test of modes
            )
        os.close(theirs)
        self._wait_for("Ctrl-C stops everything")
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def _wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 90
        while text not in self.shown.read_text():
            assert self.process.poll() is None, self.shown.read_text()
            assert time.monotonic() < deadline, self.shown.read_text()
            time.sleep(0.05)

    def address(self, label: str) -> str:
        match = re.search(rf"{label} +(http://[\d.:]+)", self.shown.read_text())
        assert match is not None
        return match[1]

    def interrupt(self) -> int:
        """Ctrl-C as a terminal sends it: to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._ours)


@contextlib.contextmanager
def up(folder: Path, *argv: str) -> Iterator[Up]:
    folder.mkdir(exist_ok=True)
    running = Up(folder, *(argv or ANY_PORTS))
    try:
        yield running
    finally:
        running.close()


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    _gone, alive = psutil.wait_procs(processes, timeout=10)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_ask_stop_and_start_again_keeps_sessions_and_usage(tmp_path: Path) -> None:
    with up(tmp_path, *ANY_PORTS, "--producers", "2") as first:
        assert len(first.children) == 5
        url = first.address("page")
        asked = tailrace("ask", "tell me about rivers", "--session", "kept", "--url", url)
        assert (asked.returncode, asked.stderr) == (0, "")
        assert first.interrupt() == 0
        assert all_gone(first.children)
    assert "no API key set: the scripted provider answers" in first.shown.read_text()
    assert first.shown.read_text().endswith("stopped\n")
    with up(tmp_path) as second:
        sessions = tailrace("sessions", "--url", second.address("page"))
        assert "kept" in sessions.stdout
        replay = tailrace("usage", "kept", "--billing-url", second.address("billing"))
        assert "completed" in replay.stdout
        assert second.interrupt() == 0
        assert all_gone(second.children)


def open_to_others(folder: Path) -> list[str]:
    """Return the paths that other users may access."""
    return [f"{path.lstat().st_mode:o} {path}" for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & 0o077]


def test_data_files_are_private_under_any_umask_and_previous_mode(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "logs").mkdir(parents=True)
    for path in (data / "nats.conf", data / "billing.db", data / "billing.db-wal", data / "logs" / "billing.log"):
        path.touch()
        path.chmod(0o666)
    for path in (data, data / "logs"):
        path.chmod(0o777)
    assert len(open_to_others(data)) == 6
    with up(tmp_path) as running:
        assert tailrace("ask", "tell me about rivers", "--url", running.address("page")).returncode == 0
        assert open_to_others(data) == []
        assert {"lock", "billing.db", "nats.conf", "nats"} <= {path.name for path in data.iterdir()}
        assert running.interrupt() == 0
    assert open_to_others(data) == []


def test_a_ledger_that_differs_from_the_log_is_rebuilt(tmp_path: Path) -> None:
    ledger = tmp_path / "data" / "billing.db"
    with up(tmp_path) as first:
        assert (
            tailrace("ask", "tell me about rivers", "--session", "kept", "--url", first.address("page")).returncode == 0
        )
        refused = tailrace("billing", "rebuild", "--data", str(tmp_path / "data"))
        assert refused.returncode == 2
        assert "in use by another `tailrace up`" in refused.stderr
        assert first.interrupt() == 0
    with contextlib.closing(sqlite3.connect(ledger)) as database, database:
        counted = database.execute("SELECT counted_output FROM generations").fetchall()
        assert database.execute("UPDATE generations SET counted_output = counted_output + 7").rowcount == 1
    for changed in (1, 0):
        rebuilt = tailrace("billing", "rebuild", "--data", str(tmp_path / "data"))
        assert (rebuilt.returncode, rebuilt.stdout.count("partition 0: log 1 to ")) == (0, 1), rebuilt.stderr
        assert f"generations: 1, set right: {changed}, " in rebuilt.stdout
    with contextlib.closing(sqlite3.connect(ledger)) as database:
        assert database.execute("SELECT counted_output FROM generations").fetchall() == counted


def test_second_start_on_the_same_folder_is_refused_and_the_first_keeps_running(tmp_path: Path) -> None:
    with up(tmp_path) as first:
        refused = tailrace("up", "--data", str(tmp_path / "data"), *ANY_PORTS)
        assert refused.returncode == 2
        assert (
            f"in use by another `tailrace up` (process {first.process.pid}, {first.address('page')})" in refused.stderr
        )
        assert first.interrupt() == 0


def test_all_ports_in_use_are_reported_and_no_service_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        page, nats = (str(s.getsockname()[1]) for s in (one, two))
        refused = tailrace("up", "--data", str(tmp_path / "data"), *ANY_PORTS, "--port", page, "--nats-port", nats)
    assert refused.returncode == 2
    assert f"{page} for delivery: address already in use" in refused.stderr
    assert f"{nats} for NATS: address already in use" in refused.stderr
    assert list((tmp_path / "data" / "logs").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_nothing_outlives_a_killed_up_and_the_next_start_resumes(tmp_path: Path) -> None:
    with up(tmp_path) as first:
        assert tailrace("ask", "x", "--session", "kept", "--url", first.address("page")).returncode == 0
        first.process.kill()
        first.process.wait(10)
        assert all_gone(first.children)
    with up(tmp_path) as second:
        assert "kept" in tailrace("sessions", "--url", second.address("page")).stdout
        assert second.interrupt() == 0


def test_answer_continues_when_delivery_is_killed(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        url = running.address("page")
        question = ("ask", "a long story", "--url", url)
        undisturbed = tailrace(*question, "--session", "calm")
        asking = subprocess.Popen(
            [sys.executable, "-m", "services.standalone.cli", *question, "--session", "disturbed"],
            cwd=REPOSITORY,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asking.stdout is not None
        begun = asking.stdout.read(20)
        (delivery,) = [p for p in running.children if "services.delivery" in p.cmdline()]
        delivery.kill()
        answer = begun + asking.stdout.read()
        assert asking.wait(60) == 0
        assert answer == undisturbed.stdout
        assert "delivery was ended by SIGKILL; restarting it" in running.shown.read_text()
        assert running.interrupt() == 0


def test_a_damaged_ledger_ends_it_with_advice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "billing.db").write_bytes(os.urandom(20_000))
    ended = tailrace("up", "--data", str(data), *ANY_PORTS)
    assert ended.returncode == 1
    assert "the billing database cannot be used: file is not a database; put a backup in its place" in ended.stderr
    assert "billing ended with exit code 4" in ended.stderr


def test_a_broker_with_a_damaged_consumer_starts_and_reports_it(tmp_path: Path) -> None:
    with up(tmp_path) as first:
        assert tailrace("ask", "rivers", "--url", first.address("page")).returncode == 0
        assert first.interrupt() == 0
    (position,) = (tmp_path / "data" / "nats").glob("jetstream/*/streams/TOKENS_0/obs/billing-0/o.dat")
    position.write_bytes(os.urandom(60))
    with up(tmp_path) as second:
        assert "the position of consumer billing-0 of TOKENS_0 was unreadable" in second.shown.read_text()
        assert tailrace("ask", "rivers", "--url", second.address("page")).returncode == 0
        assert second.interrupt() == 0
    assert len(list((tmp_path / "data" / "damaged").iterdir())) == 1


def test_cursors_from_before_a_machine_crash_are_410(tmp_path: Path) -> None:
    with up(tmp_path) as first:
        assert tailrace("ask", "rivers", "--session", "kept", "--url", first.address("page")).returncode == 0
        page = first.address("page")
        cursor = _cursor_of(page)
        assert first.interrupt() == 0
    (tmp_path / "data" / "running").write_text("another-boot")
    with up(tmp_path) as second:
        assert "the machine crashed during the last run: the logs begin a new era" in second.shown.read_text()
        page = second.address("page")
        answer = httpx.get(f"{page}/v1/sessions/kept/events", params={"after": cursor}, timeout=20)
        assert answer.status_code == 410
        assert _cursor_of(page) != cursor
        assert second.interrupt() == 0


def _cursor_of(page: str) -> str:
    """Return the cursor of a session's first event."""
    query = {"from": "start"}
    with httpx.stream("GET", f"{page}/v1/sessions/kept/events", params=query, timeout=20) as answer:
        for line in answer.iter_lines():
            if line.startswith("id:"):
                return line.removeprefix("id:").strip()
    raise AssertionError("no event came")
