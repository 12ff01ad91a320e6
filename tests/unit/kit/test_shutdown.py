"""Test the shutdown of a process: its time bounds hold in every state of its parts."""

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
from nats.js.kv import KeyValue

from services.kit.jetstream.client import heeding
from services.kit.shutdown import CUT, EXIT_STUCK, MARGIN, Stop, end, until_drained
from tests.conftest import eventually

DRAIN = 0.3
SERVICE = """
import asyncio, threading, time
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.lifecycle import run_service

async def main(stop):
    stop.drain = {drain}
    print("up", flush=True)
    {body}

run_service(main)
"""


async def stopped(body: str, *signals: signal.Signals) -> tuple[int, float, str]:
    """Run a service, send it the signals, and return its exit code, its duration in seconds and its log."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE.format(body=body, drain=DRAIN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "up\n"
        await asyncio.sleep(0.2)  # it has come to what its body does
        begun = time.monotonic()
        for signum in signals or (signal.SIGTERM,):
            process.send_signal(signum)
            await asyncio.sleep(0.1)
        await eventually(lambda: process.poll() is not None, timeout=60)
        return process.returncode, time.monotonic() - begun, process.stdout.read()
    finally:
        process.kill()


async def test_a_service_that_does_not_stop_is_cancelled_after_its_drain_time() -> None:
    code, seconds, output = await stopped("await stop.wait(); await asyncio.sleep(600)")
    assert code == 0
    assert seconds >= DRAIN + CUT - 0.1
    assert "service did not end in time and was cancelled" in output


async def test_a_second_signal_ends_a_service_at_once() -> None:
    code, seconds, _ = await stopped("await stop.wait(); await asyncio.sleep(600)", signal.SIGINT, signal.SIGINT)
    assert code == 0
    assert seconds < CUT


@pytest.mark.parametrize(
    "body",
    [
        "await stop.wait()\n    while True:\n        try: await asyncio.sleep(600)\n        except BaseException: pass",
        "await stop.wait(); time.sleep(600)",
    ],
    ids=["deaf to cancellations", "blocks the event loop"],
)
async def test_a_service_that_cannot_be_cancelled_is_ended_with_its_own_exit_code(body: str) -> None:
    code, seconds, output = await stopped(body)
    assert code == EXIT_STUCK
    assert seconds >= DRAIN + MARGIN - 0.1
    assert "service did not end in time and was killed" in output
    assert "in main" in output, "where it stood is written"


async def test_a_cancellation_that_is_lost_while_a_service_starts_is_repeated() -> None:
    body = "try: await asyncio.sleep(600)\n    except asyncio.CancelledError: await asyncio.sleep(600)"
    code, seconds, _ = await stopped(body)
    assert code == 0
    assert seconds < MARGIN


async def test_shutdown_does_not_wait_for_leftover_threads() -> None:
    code, seconds, _ = await stopped("threading.Thread(target=time.sleep, args=(600,)).start(); await stop.wait()")
    assert code == 0
    assert seconds < CUT


async def test_a_broker_outage_during_shutdown_is_not_a_failure() -> None:
    code, _, output = await stopped('await stop.wait(); raise ExceptionGroup("x", [BrokerUnavailable("gone")])')
    assert code == 0
    assert "gone" in output
    assert "Traceback" not in output


def test_the_drain_time_starts_at_the_stop_request() -> None:
    stop = Stop(10.0)
    assert stop.left() == 10.0
    assert stop.left(5.0) == 15.0
    stop.set()
    assert 0 < stop.left() < 10.0
    assert 10.0 < stop.left(5.0) < 15.0
    stop.drain = 0.0
    assert stop.left() == 0.0


async def test_a_task_that_misses_a_cancellation_is_cancelled_again() -> None:
    async def deaf(times: int) -> None:
        for _ in range(times):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(600)

    once, always = asyncio.create_task(deaf(1)), asyncio.create_task(deaf(9))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await end(once, always, seconds=0.1)
    assert once.done()
    assert not always.done()
    while not always.done():
        always.cancel()
        await asyncio.sleep(0)


@pytest.mark.parametrize("heeds", [True, False])
async def test_work_is_cancelled_at_the_end_of_the_drain_time(heeds: bool) -> None:
    stop, ended = Stop(0.1), asyncio.Event()

    async def work() -> None:
        try:
            await (stop if heeds else asyncio.Event()).wait()
        finally:
            ended.set()

    asyncio.get_running_loop().call_later(0.05, stop.set)
    async with asyncio.timeout(10):
        await until_drained(stop, work())
    assert ended.is_set()


async def test_a_failure_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise LookupError("x")

    with pytest.raises(LookupError):
        await until_drained(Stop(), work())


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancellation_at_the_same_time_as_a_bucket_update_takes_effect(turns: int) -> None:
    """The library uses `asyncio.wait_for`, which forgets it before Python 3.12: producers hung in their shutdown."""
    watcher: Any = KeyValue.KeyWatcher(None)

    async def follow() -> None:
        while True:
            await heeding(watcher.updates(timeout=600))

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    watcher._updates.put_nowait(None)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait({task})
    assert task.cancelled()
