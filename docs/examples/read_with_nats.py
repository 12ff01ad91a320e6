"""Reads the log with plain nats-py and the acceptance rule of ``schemas.acceptance``; nothing else of Tailrace.

    python read_with_nats.py durable NAME    # through a durable consumer: each accepted event at least once
    python read_with_nats.py live            # what comes from now on, as it is stored

Prints accepted events as lines of JSON. ``--tenant`` narrows what is read; ``--until-empty`` ends when nothing is left.
"""

import argparse
import asyncio
import sys
from contextlib import suppress

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig
from nats.js.errors import NotFoundError

from schemas.acceptance import BEGINNING, Position, Verdict, judge
from schemas.codec import MalformedEvent, decode_header


class Judge:
    """Applies the rule to each generation (a subject of the log), in the order of its stored messages.

    The verdict on a message follows from all messages of its subject before it. So whatever this reader has not seen is
    read first: after a restart, for a message that comes again, and for one that another reader got in between.
    """

    def __init__(self, js: JetStreamContext) -> None:
        self.js = js
        self.known: dict[str, tuple[Position, int]] = {}  # by subject, and up to which stream sequence

    async def accepts(self, stream: str, subject: str, seq: int, data: bytes, *, follows: bool = False) -> bool:
        """Tell whether an event counts. ``follows``: its subject has no message between the last one judged and it."""
        position, through = self.known.get(subject, (BEGINNING, 0))
        if seq <= through:  # it comes again
            return self.step(await self.before(stream, subject, seq, BEGINNING, 0), data)[1]
        if not follows or through == 0:
            position = await self.before(stream, subject, seq, position, through)
        position, accepted = self.step(position, data)
        self.known[subject] = (position, seq)
        if len(self.known) > 10_000:
            self.known.clear()  # whatever goes on is read again
        return accepted

    async def before(self, stream: str, subject: str, seq: int, position: Position, through: int) -> Position:
        """Return the position before a message, having read what lies between ``through`` and it."""
        while True:
            try:
                stored = await self.js.get_msg(stream, seq=through + 1, subject=subject, next=True, direct=True)
            except NotFoundError:
                return position
            assert stored.seq is not None
            if stored.seq >= seq:
                return position
            position, _ = self.step(position, stored.data or b"")
            through = stored.seq

    @staticmethod
    def step(position: Position, data: bytes) -> tuple[Position, bool]:
        """Return the position after a stored message, and whether it was accepted."""
        try:
            header = decode_header(data)
        except MalformedEvent:
            return position, False
        position, verdict = judge(position, header.type, header.epoch, header.seq)
        return position, verdict is Verdict.ACCEPTED


def show(data: bytes) -> None:
    """Handle an accepted event. What is done here may happen again: (generation, seq) tells repeats."""
    sys.stdout.write(data.decode() + "\n")
    sys.stdout.flush()


async def durable(js: JetStreamContext, stream: str, name: str, tenant: str, until_empty: bool) -> None:
    """Read one partition through a durable consumer, from the beginning of the log on."""
    partition = stream.removeprefix("TOKENS_")
    config = ConsumerConfig(ack_wait=30, max_ack_pending=1_000)
    subscription = await js.pull_subscribe(f"tokens.{partition}.{tenant}.*.*", name, stream=stream, config=config)
    judging, last = Judge(js), 0
    while True:
        try:
            batch = await subscription.fetch(100, timeout=1)
        except TimeoutError:
            info = await subscription.consumer_info()
            if until_empty and not info.num_pending and not info.num_ack_pending:
                return
            continue
        for msg in batch:
            about = msg.metadata
            if about.sequence.consumer != last + 1:
                judging.known.clear()  # another reader of this consumer got what came between
            last = about.sequence.consumer
            if await judging.accepts(stream, msg.subject, about.sequence.stream, msg.data, follows=True):
                show(msg.data)
            await msg.ack()


async def live(client: Client, js: JetStreamContext, tenant: str) -> None:
    """Read what is stored from now on. What was lost on the way is judged, but not shown."""
    judging = Judge(js)
    queue: asyncio.Queue[Msg] = asyncio.Queue(maxsize=10_000)
    await client.subscribe(f"live.*.{tenant}.*.*", cb=queue.put)
    await client.flush()
    sys.stderr.write("listening\n")
    sys.stderr.flush()
    while True:
        msg = await queue.get()
        headers = msg.headers or {}
        stream, subject, seq = headers["Nats-Stream"], headers["Nats-Subject"], int(headers["Nats-Sequence"])
        previous = int(headers["Nats-Last-Sequence"])  # the message of this subject that was stored before it
        follows = previous == judging.known.get(subject, (BEGINNING, 0))[1]
        if await judging.accepts(stream, subject, seq, msg.data, follows=follows):
            show(msg.data)


async def main(wish: argparse.Namespace) -> None:
    """Connect, find the partitions, and read."""
    client = await nats.connect(wish.url)
    try:
        js = client.jetstream()
        if wish.how == "live":
            await live(client, js, wish.tenant)
        streams = [info.config.name or "" for info in await js.streams_info()]
        async with asyncio.TaskGroup() as group:
            for stream in (name for name in streams if name.startswith("TOKENS_")):
                group.create_task(durable(js, stream, wish.name, wish.tenant, wish.until_empty))
    finally:
        await client.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read the log with plain nats-py.")
    parser.add_argument("how", choices=["durable", "live"])
    parser.add_argument("name", nargs="?", default="example", help="name of the durable consumer")
    parser.add_argument("--url", default="nats://127.0.0.1:4222")
    parser.add_argument("--tenant", default="*", help="only this tenant")
    parser.add_argument("--until-empty", action="store_true", help="end when nothing is left")
    with suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
