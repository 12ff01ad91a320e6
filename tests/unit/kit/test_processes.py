"""Restarts and ends of child processes."""

import asyncio
import signal
import sys

import pytest

from services.kit.processes import HEALTHY_AFTER, Crashes, end_process, restart_delay

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = "import time; print('up', flush=True); time.sleep(60)"


async def started(program: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


def test_restart_delay_doubles_up_to_its_bound() -> None:
    assert [restart_delay(n) for n in (1, 2, 3, 6, 7, 1_000)] == [0.25, 0.5, 1.0, 8.0, 8.0, 8.0]


def test_a_healthy_run_forgets_earlier_crashes() -> None:
    crashes = Crashes()
    assert [crashes.add(1.0) for _ in range(3)] == [0.25, 0.5, 1.0]
    assert (crashes.add(HEALTHY_AFTER + 1), crashes.count) == (0.25, 1)


async def test_a_process_that_heeds_sigterm_ends_without_being_killed() -> None:
    process = await started(POLITE)
    assert await end_process(process, 10)
    assert process.returncode == -signal.SIGTERM


async def test_a_process_that_ignores_sigterm_is_killed_after_its_grace() -> None:
    process = await started(DEAF)
    assert not await end_process(process, 0.1)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False])
async def test_hurry_kills_at_once(before: bool) -> None:
    process, hurry = await started(DEAF), asyncio.Event()
    if before:
        hurry.set()
    else:
        asyncio.get_running_loop().call_later(0.05, hurry.set)
    async with asyncio.timeout(10):
        assert not await end_process(process, 60, hurry)
    assert process.returncode == -signal.SIGKILL


async def test_a_process_that_has_ended_needs_no_signal() -> None:
    process = await started("print('up', flush=True)")
    await process.wait()
    assert await end_process(process, 1)
