"""Test the process tree with fake services: real processes, real signals."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from bench.processes import free_port
from services.standalone.embedded import MAX_PAYLOAD, find_nats_server, render_config
from services.standalone.errors import CommandFailed, StartFailed
from services.standalone.plan import ServiceSpec
from services.standalone.supervisor import Supervisor

REPOSITORY = Path(__file__).parents[3]
SUPPORT = REPOSITORY / "tests" / "support"


class Tree:
    """Fake services and their journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.journal.touch()
        self.said: list[str] = []
        self.specs: list[ServiceSpec] = []

    def add(self, name: str, *, start: int = 0, stop: int = 0, grace: float = 10.0, mode: str = "") -> "Tree":
        port = free_port()
        argv = (sys.executable, "-S", str(SUPPORT / "fake_service.py"), str(port), str(self.journal), name, mode)
        ready = f"http://127.0.0.1:{port}/readyz"
        self.specs.append(
            ServiceSpec(
                name=name,
                argv=argv,
                env=dict(os.environ),
                ready=ready,
                start_phase=start,
                stop_phase=stop,
                grace=grace,
            )
        )
        return self

    def notes(self) -> list[str]:
        return [" ".join(line.split()[:2]) for line in self.journal.read_text().splitlines()]

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self.journal.read_text().splitlines() if " start " in line]

    def supervisor(self) -> Supervisor:
        return Supervisor(self.specs, self.folder, self.said.append)


def runs(pid: int) -> bool:
    """An ended process whose new parent has not noticed yet does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path)
    yield tree
    left = [pid for pid in tree.pids() if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == [], "processes were left running"


@asynccontextmanager
async def running(tree: Tree) -> AsyncIterator[Supervisor]:
    supervisor, ready = tree.supervisor(), asyncio.Event()
    task = asyncio.create_task(supervisor.run(ready.set))
    try:
        async with asyncio.timeout(20):
            await ready.wait()
            yield supervisor
            supervisor.stop()
            await task
    finally:
        if not task.done():
            supervisor.stop()
            supervisor.stop()
            await asyncio.wait({task})


async def until(condition: Callable[[], object], timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


async def test_services_start_in_start_order_and_stop_in_stop_order(tree: Tree) -> None:
    tree.add("broker", start=0, stop=2).add("billing", start=1, stop=1).add("delivery", start=2, stop=0)
    async with running(tree) as supervisor:
        assert tree.notes() == ["broker start", "billing start", "delivery start"]
        assert sorted(supervisor.pids.values()) == sorted(tree.pids())
    assert tree.notes()[3:] == ["delivery stop", "billing stop", "broker stop"]
    assert supervisor.pids == {}


async def test_crashed_service_is_restarted_and_the_others_keep_running(tree: Tree) -> None:
    tree.add("billing").add("delivery")
    async with running(tree) as supervisor:
        before = supervisor.pids
        with contextlib.suppress(OSError):
            urllib.request.urlopen(tree.specs[1].ready.replace("readyz", "crash"), timeout=5)
        await until(lambda: tree.notes().count("delivery start") == 2)
        await until(lambda: "delivery" in supervisor.pids)
        assert supervisor.pids["billing"] == before["billing"]
        assert supervisor.pids["delivery"] != before["delivery"]
    assert "delivery ended with exit code 1; restarting it in 0.25 s" in tree.said


async def test_killed_service_is_restarted(tree: Tree) -> None:
    tree.add("producer")
    async with running(tree) as supervisor:
        os.kill(supervisor.pids["producer"], signal.SIGKILL)
        await until(lambda: tree.notes().count("producer start") == 2)
    assert any("was ended by SIGKILL" in line for line in tree.said)


async def test_a_service_beyond_its_crash_limit_stops_all_services(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.standalone.member.MAX_CRASHES", 2)
    tree.add("billing").add("delivery")
    supervisor, ready = tree.supervisor(), asyncio.Event()
    task = asyncio.create_task(supervisor.run(ready.set))
    await asyncio.wait_for(ready.wait(), 20)
    first = supervisor.pids["delivery"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: supervisor.pids.get("delivery", first) != first)
    await until(lambda: tree.notes().count("delivery start") == 2)
    os.kill(supervisor.pids["delivery"], signal.SIGKILL)
    with pytest.raises(CommandFailed, match="delivery was ended by SIGKILL; its log is"):
        await asyncio.wait_for(task, 20)
    assert tree.notes()[-1] == "billing stop"


async def test_service_that_cannot_start_ends_the_start_with_its_message(tree: Tree) -> None:
    tree.add("billing").add("delivery", start=1, mode="broken").add("page", start=2)
    with pytest.raises(StartFailed, match="delivery ended with exit code 2"):
        await asyncio.wait_for(tree.supervisor().run(lambda: pytest.fail("not ready")), 20)
    assert "delivery: tailrace: settings are not usable" in tree.said
    assert "page start" not in tree.notes()
    assert tree.notes()[-1] == "billing stop"


async def test_program_that_does_not_exist_is_reported(tree: Tree) -> None:
    tree.add("delivery")
    tree.specs[0] = msgspec.structs.replace(tree.specs[0], argv=("/nowhere/delivery",))
    with pytest.raises(StartFailed, match="delivery ended with exit code 1"):
        await asyncio.wait_for(tree.supervisor().run(lambda: None), 20)
    assert "delivery: cannot run /nowhere/delivery: No such file or directory" in tree.said


async def test_service_that_ignores_sigterm_is_killed_after_its_grace_period(tree: Tree) -> None:
    tree.add("delivery", mode="stubborn", grace=0.1).add("billing", stop=1)
    async with running(tree):
        pass
    assert "delivery did not end within 0.1 s and is killed" in tree.said
    assert tree.notes()[-1] == "billing stop"


async def test_service_that_fails_while_it_stops_is_reported(tree: Tree) -> None:
    tree.add("delivery", mode="clumsy")
    async with running(tree):
        pass
    assert any("delivery ended with exit code 1 while stopping; its log is" in line for line in tree.said)


async def test_second_stop_kills_at_once(tree: Tree) -> None:
    tree.add("delivery", mode="stubborn", grace=600)
    async with running(tree) as supervisor:
        supervisor.stop()
        supervisor.stop()


async def test_stop_while_starting_ends_all_started_services(tree: Tree) -> None:
    tree.add("broker").add("delivery", start=1)
    tree.specs[1] = msgspec.structs.replace(tree.specs[1], ready="http://127.0.0.1:9/never")
    supervisor = tree.supervisor()
    task = asyncio.create_task(supervisor.run(lambda: pytest.fail("not ready")))
    await until(lambda: "delivery start" in tree.notes())
    supervisor.stop()
    await asyncio.wait_for(task, 20)
    assert sorted(tree.notes()[2:]) == ["broker stop", "delivery stop"]


def start_runner(tree: Tree) -> subprocess.Popen[str]:
    specs = msgspec.json.encode(tree.specs).decode()
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "supervisor_process.py"), specs, str(tree.folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_nothing_outlives_a_supervisor_that_is_killed(tree: Tree) -> None:
    process = start_runner(tree.add("delivery").add("billing", mode="stubborn"))
    process.kill()
    process.wait(10)
    assert gone(tree.pids())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_everything_and_reaches_each_service_once(tree: Tree, signum: signal.Signals) -> None:
    process = start_runner(tree.add("delivery").add("billing", stop=1))
    os.killpg(process.pid, signum)  # as a terminal does it: to the whole foreground group
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert tree.notes()[2:] == ["delivery stop", "billing stop"]


async def test_embedded_broker_keeps_its_streams_over_a_restart(tree: Tree, tmp_path: Path) -> None:
    import nats

    port = free_port()
    (tmp_path / "nats.conf").write_text(render_config(port, tmp_path / "a folder"))
    tree.specs.append(
        ServiceSpec(
            name="nats-server",
            argv=(str(find_nats_server().path), "-c", str(tmp_path / "nats.conf")),
            env={},
            ready=f"nats://127.0.0.1:{port}",
            start_phase=0,
            stop_phase=0,
            grace=10.0,
        )
    )
    async with running(tree):
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        await client.jetstream().add_stream(name="S", subjects=["s"])
        await client.jetstream().publish("s", b"kept")
        assert client.max_payload == MAX_PAYLOAD > 16 * 1024 * 1024
        await client.close()
    async with running(tree):
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        assert (await client.jetstream().get_last_msg("S", "s")).data == b"kept"
        await client.close()
    assert "Server is ready" in (tmp_path / "nats-server.log").read_text()
