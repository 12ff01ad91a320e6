"""Run a supervisor as a process: ``python supervisor_process.py SPECS LOGS``, SPECS in JSON; prints "ready"."""

import asyncio
import sys
from pathlib import Path

import msgspec

from services.standalone.plan import ServiceSpec
from services.standalone.supervisor import Supervisor


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def main() -> None:
    specs = msgspec.json.decode(sys.argv[1], type=list[ServiceSpec])
    supervisor = Supervisor(specs, Path(sys.argv[2]), say)
    supervisor.stop_on_signals()
    await supervisor.run(lambda: say("ready"))


asyncio.run(main())
