"""Test the end of a process in a chaos run and its recorded exit."""

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from bench.chaos.credentials import Credentials
from bench.chaos.stage import Member, Stage
from tests.conftest import eventually

STUBBORN = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
WILLING = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(60)"


async def started(folder: Path, program: str) -> Member:
    member = Member("one", [sys.executable, "-c", program], os.environ, folder)
    member.start()
    await eventually(lambda: "up" in (folder / "one.log").read_text(), timeout=30)
    return member


async def test_a_requested_stop_returns_the_exit_code(tmp_path: Path) -> None:
    member = await started(tmp_path, WILLING)
    exited = await member.stop()
    assert exited is not None
    assert (exited.code, exited.asked) == (0, True)


async def test_a_kill_during_a_drain_reports_no_exit_code(tmp_path: Path) -> None:
    member = await started(tmp_path, STUBBORN)
    stopping = asyncio.create_task(member.stop())
    await asyncio.sleep(0)
    member.kill()
    assert await stopping is None


async def test_a_second_stop_during_a_drain_reports_no_second_exit(tmp_path: Path) -> None:
    member = await started(tmp_path, WILLING)
    first, second = await asyncio.gather(member.stop(), member.stop())
    assert first is not None
    assert second is None


async def test_a_draining_process_is_neither_started_nor_paused(tmp_path: Path) -> None:
    member = await started(tmp_path, WILLING)
    stopping = asyncio.create_task(member.stop())
    await asyncio.sleep(0)
    member.start()
    member.pause()
    assert (member.wanted, member.paused) == (False, False)
    exited = await stopping
    assert exited is not None
    assert exited.code == 0
    member.start()
    assert member.wanted
    member.kill()


async def test_a_stage_that_cannot_be_set_up_leaves_no_process(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 1, Credentials(tmp_path, None))
    taken = next(iter(stage.links.values()))[0].port
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(OSError, match="in use"):
        await stage.__aenter__()
    started = [member.process for member in [stage.provider, *stage.nodes]]
    assert [process.code for process in started if process is not None] == [-9, -9]
