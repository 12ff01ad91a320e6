"""Scripted answers of an OpenAI-like provider, its configuration, and queries of the resulting log."""

import json
from collections.abc import Iterable
from typing import Any

from schemas.events import AnyEvent, Delta, Notice, is_terminal, type_of
from schemas.requests import Request
from schemas.subjects import control_subject
from services.kit.jetstream.broker import Broker
from services.producer.core.retry import RetryPolicy
from tests.conftest import eventually
from tests.support.producer_worker import accepted_log, ended_log, enqueue, raw_log
from tests.support.provider_server import Provider, Replay

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
QUICK = RetryPolicy(max_attempts=3, base=0.01, maximum=0.2)
ONCE = RetryPolicy(max_attempts=1)


def chunk(text: str) -> bytes:
    """Return one chunk of text on the wire."""
    return _data(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def ending(*, usage: bool = True) -> bytes:
    """Return the end of an answer: finish reason, usage where wanted, end marker."""
    finish = _data(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    return finish + (_data(choices=[], usage=USAGE) if usage else b"") + DONE


def _data(**fields: Any) -> bytes:
    body = {"id": "c1", "object": "chat.completion.chunk", "created": 1764870123, "model": "m", **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def saying(*texts: str, **settings: Any) -> Replay:
    """Return a whole answer, a chunk for each text."""
    return Replay([*(chunk(text) for text in texts), ending()], **settings)


def cut_off(*texts: str) -> Replay:
    """Return an answer that ends without its end marker, a chunk for each text."""
    return Replay([chunk(text) for text in texts])


def silent(*texts: str) -> Replay:
    """Return an answer that goes silent after these texts."""
    return Replay([chunk(text) for text in texts], end="hang")


def refusing(status: int, **headers: str) -> Replay:
    """Return a refusal with an error body."""
    body = json.dumps({"error": {"message": f"no: {status}"}}).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Replay([body], status=status, headers={"content-type": "application/json", **names})


def config(*urls: str, alias: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Return a configuration of providers ``p0``, ``p1`` … at these addresses; alias ``m`` tries them in order."""
    candidates = [f"p{number}/m" for number in range(len(urls))]
    providers = {f"p{n}": {"dialect": "openai", "base_url": url, **settings} for n, url in enumerate(urls)}
    return {"providers": providers, "models": {"m": {"candidates": candidates, **(alias or {})}}}


def kinds(events: Iterable[AnyEvent]) -> list[str]:
    """Return the types of the events, adjacent deltas as one."""
    found: list[str] = []
    for event in events:
        kind = f"notice {event.code}" if isinstance(event, Notice) else type_of(event)
        if kind != "delta" or found[-1:] != ["delta"]:
            found.append(kind)
    return found


def notices(events: Iterable[AnyEvent], code: str) -> list[Notice]:
    """Return the notices of one code."""
    return [event for event in events if isinstance(event, Notice) and event.code == code]


def code_of(events: list[AnyEvent]) -> str | None:
    """Return the code of the last event, where it has one."""
    return getattr(events[-1], "code", None)


async def deltas(broker: Broker, request: Request, count: int = 1) -> None:
    """Wait until so many deltas are accepted."""

    async def there() -> bool:
        return sum(isinstance(event, Delta) for event in await accepted_log(broker, request)) >= count

    await eventually(there)


async def noticed(broker: Broker, request: Request, code: str) -> None:
    """Wait for a notice."""

    async def there() -> bool:
        return bool(notices(await accepted_log(broker, request), code))

    await eventually(there)


async def cancel(broker: Broker, request: Request) -> bytes | None:
    """Ask the running producer to cancel; ``None`` when no producer listens."""
    return await broker.request(control_subject(request.tenant, request.session, request.generation), b"cancel")


async def let_go(provider: Provider, *, timeout: float = 10.0) -> None:
    """Wait until the provider sees none of its answers under way."""
    await eventually(lambda: provider.active == 0, timeout=timeout, interval=0.001)


async def assert_sound(broker: Broker, request: Request) -> list[AnyEvent]:
    """Check that accepted events are gapless with one terminal and others repeat them; return the accepted."""
    stored = await raw_log(broker, request)
    events = await accepted_log(broker, request)
    assert [event.seq for event in events] == list(range(len(events)))
    assert [is_terminal(event) for event in events].count(True) == 1
    assert [event for event in stored if event not in events] == []
    return events


async def answered(broker: Broker, request: Request) -> list[AnyEvent]:
    """Queue a request, wait for its terminal, check its log and return the accepted events."""
    await enqueue(broker, request)
    await ended_log(broker, request)
    return await assert_sound(broker, request)
