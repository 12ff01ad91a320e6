"""Reads the log with plain nats-py and the acceptance rule of ``schemas.acceptance``; nothing else of Tailrace.

    python read_with_nats.py durable NAME    # through a durable consumer: each accepted event at least once
    python read_with_nats.py live            # what comes from now on, as it is stored

Prints accepted events as lines of JSON. ``--tenant`` narrows what is read; ``--until-empty`` ends when nothing is left.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig
from nats.js.errors import NotFoundError

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import MalformedEvent, decode_header

Message = tuple[int, bytes]
"""Stream sequence and data."""


class Judge:
    """Applies the rule to each generation (a subject of the log), in the order of its stored messages.

    The verdict on a message follows from all messages of its subject before it. So whatever this reader has not seen is
    read first: after a restart, for a message that comes again, and for one that another reader got in between. Where
    the first events of a generation have expired, it is joined at the highest epoch that the log still keeps.
    """

    def __init__(self, js: JetStreamContext) -> None:
        self.js = js
        self.known: dict[str, Acceptance] = {}  # by subject

    async def accepts(self, stream: str, subject: str, seq: int, data: bytes, *, follows: bool = False) -> bool:
        """Tell whether an event counts. ``follows``: its subject has no message between the last one judged and it."""
        acceptance = self.known.get(subject, Acceptance())
        if seq <= acceptance.through:  # it comes again
            acceptance, follows = Acceptance(), False
        else:
            self.known[subject] = acceptance
        if not follows or acceptance.through == 0:
            async for at, stored in self.read(stream, subject, acceptance.through + 1, seq):
                await self.step(acceptance, stream, subject, at, stored)
        accepted = await self.step(acceptance, stream, subject, seq, data)
        if len(self.known) > 10_000:
            self.known.clear()  # whatever goes on is read again
        return accepted

    async def read(self, stream: str, subject: str, start: int, stop: int | None = None) -> AsyncIterator[Message]:
        """Yield the stored messages of a subject from one stream sequence up to another, that one excluded."""
        while True:
            try:
                stored = await self.js.get_msg(stream, seq=start, subject=subject, next=True, direct=True)
            except NotFoundError:
                return
            assert stored.seq is not None
            if stop is not None and stored.seq >= stop:
                return
            yield stored.seq, stored.data or b""
            start = stored.seq + 1

    async def step(self, acceptance: Acceptance, stream: str, subject: str, seq: int, data: bytes) -> bool:
        """Judge the next stored message; tell whether it was accepted."""
        try:
            header = decode_header(data)
        except MalformedEvent:
            acceptance.through = seq
            return False
        if acceptance.lacks(header) and await self.has_lost(acceptance, stream, subject):
            highest = 0
            async for _, stored in self.read(stream, subject, 1):
                with suppress(MalformedEvent):
                    highest = max(highest, decode_header(stored).epoch)
            acceptance.join(highest)
        accepted = acceptance.offer(header, seq) is Verdict.ACCEPTED
        if accepted and acceptance.joined_at == seq:
            sys.stderr.write(f"{subject}: {acceptance.gap_before(seq)}\n")
        return accepted

    async def has_lost(self, acceptance: Acceptance, stream: str, subject: str) -> bool:
        """Tell whether events that this reader has not seen may have expired; else their writer will repeat them."""
        if not acceptance.begun:
            return True
        async for at, _ in self.read(stream, subject, 1):
            return at > acceptance.through
        return True


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
        known = judging.known.get(subject)
        follows = known is not None and previous == known.through
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
