"""The scripted provider in real time."""

import asyncio
from typing import Any

import pytest

from schemas.requests import Message
from services.kit.clock import SystemClock
from services.producer.adapters.scripted import ScriptedUpstream
from services.producer.adapters.upstreams import Upstreams
from services.producer.core.parts import End, Part, Text
from services.producer.core.registry import Registry
from services.producer.core.script import play
from services.producer.ports import UpstreamRefused, UpstreamRequest


def call(model: str, **params: Any) -> UpstreamRequest:
    return UpstreamRequest(model=model, messages=[Message("user", "hi")], params=params)


def text_of(parts: list[Part]) -> str:
    return "".join(p.text for p in parts if isinstance(p, Text))


async def reads_of(asked: UpstreamRequest) -> list[list[Part]]:
    reads = []
    async with ScriptedUpstream(SystemClock()).open(asked) as stream:
        while (read := await stream.read()) is not None:
            reads.append(read)
    return reads


@pytest.mark.parametrize("model", ["story", "json", "tools", "reasoning", "megabyte", "no-usage"])
async def test_the_stream_equals_the_script(model: str) -> None:
    asked = call(model, tokens_per_second=2000, tokens=100)
    parts = [part for read in await reads_of(asked) for part in read]
    assert parts[-1] == End()
    assert text_of(parts) == text_of([part for _, step in play(asked) for part in step])


async def test_parts_due_together_are_one_read_of_bounded_size() -> None:
    reads = await reads_of(call("megabyte"))
    assert 1_000_000 / 17_000 <= len(reads) <= 100
    assert all(len([p for p in read if isinstance(p, Text)]) <= 1 for read in reads)
    assert max(len(text_of(read)) for read in reads) < 17_000


async def test_a_slow_script_arrives_in_several_reads() -> None:
    reads = await reads_of(call("story", tokens=20, tokens_per_second=200))
    assert len(reads) > 5


async def test_a_stalled_script_waits_until_it_is_cancelled() -> None:
    reading = asyncio.create_task(reads_of(call("stall", tokens_per_second=0)))
    done, _ = await asyncio.wait([reading], timeout=0.2)
    assert not done
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize(("model", "code"), [("refuse", "upstream_rate_limited"), ("opera", "upstream_not_found")])
async def test_a_refusal_is_raised_before_the_stream(model: str, code: str) -> None:
    with pytest.raises(UpstreamRefused) as caught:
        await reads_of(call(model))
    assert caught.value.failure.code == code


async def test_the_registry_leads_to_the_upstream() -> None:
    registry = Registry.load({}, {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    async with Upstreams.opened(registry, SystemClock()) as upstreams:
        [candidate] = registry.resolve("scripted/story")
        assert isinstance(upstreams.of(candidate.provider), ScriptedUpstream)
        assert upstreams.of(registry.resolve("openai/x")[0].provider) is not None
