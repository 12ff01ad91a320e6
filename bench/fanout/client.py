"""A client process: many subscribers of one plan.

Run as ``python -m bench.fanout.client PLAN`` with a `bench.fanout.scenarios.Plan` as JSON. It writes the file ``ready``
when it is connected, and at the end ``result`` and the latencies (native 64-bit nanoseconds). It keeps its connections
until it is stopped, so that their memory can be measured from outside.
"""

import asyncio
import gc
import random
import signal
import sys
import time
from array import array
from pathlib import Path
from typing import Final

import msgspec

from bench.fanout.calls import Calls
from bench.fanout.crowd import Crowd, CrowdResult, connected
from bench.fanout.events import session
from bench.fanout.protocols import PROTOCOLS
from bench.fanout.returning import Returning, replay, storm
from bench.fanout.scenarios import Plan
from bench.stamps import Stamps

__all__ = ["main"]

GRACE: Final = 0.3
LINGER: Final = 300
SMALL: Final = 4_096


def _run(plan: Plan, deadline: float) -> tuple[CrowdResult, "array[int]"]:
    stamps = Stamps(Path(plan.stamps)).cells
    ready = Path(plan.ready).touch
    if plan.protocol == "grpc":
        return asyncio.run(_call(plan, stamps))
    if plan.kind == "live":
        crowd = Crowd(plan, stamps)
        crowd.open()
        ready()
        crowd.run(deadline, GRACE)
        return crowd.result(), crowd.took
    clients = Returning(plan, stamps)
    try:
        if plan.kind == "storm":
            storm(clients, deadline, ready, random.Random(plan.first))
        else:
            replay(clients, deadline, ready)
    except (OSError, TimeoutError) as error:
        clients.problem(repr(error))
    return clients.result(), clients.took


async def _call(plan: Plan, stamps: memoryview) -> tuple[CrowdResult, "array[int]"]:
    calls = Calls(plan, stamps)
    await calls.run(Path(plan.ready).touch)
    return calls.result(), calls.took


def _stick(plan: Plan) -> None:
    """Connect, subscribe, and do not read until stopped."""
    held = []
    for number in range(plan.first, plan.stop):
        connection = connected(plan.port, SMALL)
        call = PROTOCOLS[plan.protocol].call(session(plan.base + number % plan.sessions), b"", False)
        connection.sendall(call)
        held.append(connection)
    Path(plan.ready).touch()
    signal.alarm(int(plan.deadline) + LINGER)
    signal.pause()


def main() -> None:
    """Read the plan, run, write the result."""
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)
    if plan.kind == "stuck":
        _stick(plan)
        return
    gc.disable()  # a garbage collection here would count as latency of the target; runs are short
    result, took = _run(plan, time.monotonic() + plan.deadline)
    with Path(plan.latencies).open("wb") as file:
        took.tofile(file)
    unfinished = Path(plan.result + ".part")
    unfinished.write_bytes(msgspec.json.encode(result))
    unfinished.rename(plan.result)
    signal.alarm(LINGER)
    signal.pause()


if __name__ == "__main__":
    main()
