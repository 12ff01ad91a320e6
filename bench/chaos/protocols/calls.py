"""gRPC: a server stream, or a subscription on a bidirectional call with credit."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from bench.chaos.history import Got
from bench.chaos.pace import slow_for
from bench.chaos.protocols.wanted import SILENCE, Refused, Wanted
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb

__all__ = ["read_call"]

_SERVICE: Final = "/tailrace.v1.Delivery"
_STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.OUT_OF_RANGE: 410,
    grpc.StatusCode.FAILED_PRECONDITION: 410,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INTERNAL: 500,
}
_QUIET: Final = 3 * SILENCE
"""Seconds without an event after which the call is aborted: gRPC shows no heartbeats."""
_BROKEN: Final = "Internal error from Core"
"""Error text of gRPC's client for a write to a connection that has just closed."""


async def read_call(wanted: Wanted) -> None:
    """Read until the server ends the stream, or all expected events have arrived."""
    metadata = [(name.lower(), value) for name, value in wanted.headers.items()]
    async with grpc.aio.insecure_channel(wanted.call, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            async with asyncio.timeout(3):
                await channel.channel_ready()
            await (_read(channel, metadata, wanted) if wanted.window is None else _attach(channel, metadata, wanted))
        except grpc.aio.AioRpcError as error:
            status = _STATUS.get(error.code())
            if status is None or error.details() == _BROKEN:
                raise
            raise Refused(status, error.details() or "") from error


def _request(wanted: Wanted) -> Any:
    request = pb.ReadRequest(session=wanted.session, generation=wanted.generation or "", after=wanted.cursor or "")
    if wanted.cursor is None and wanted.generation is None:
        request.begin = pb.BEGIN_START
    return request


async def _read(channel: grpc.aio.Channel, metadata: list[tuple[str, str]], wanted: Wanted) -> None:
    method = channel.unary_stream(
        f"{_SERVICE}/Read",
        request_serializer=pb.ReadRequest.SerializeToString,
        response_deserializer=pb.ReadResponse.FromString,
    )
    call = method(_request(wanted), metadata=metadata)
    try:
        wanted.opened(200)
        said_bye = False
        while not wanted.there():
            async with asyncio.timeout(slow_for(_QUIET)):
                response: Any = await call.read()
            if response is grpc.aio.EOF:
                if await call.code() == grpc.StatusCode.OK and not said_bye and wanted.generation is not None:
                    wanted.over()
                return
            said_bye |= any(frame.WhichOneof("kind") == "bye" for frame in response.frames)
            _take(wanted, response.frames)
    finally:
        call.cancel()


async def _attach(channel: grpc.aio.Channel, metadata: list[tuple[str, str]], wanted: Wanted) -> None:
    method = channel.stream_stream(
        f"{_SERVICE}/Attach",
        request_serializer=pb.AttachRequest.SerializeToString,
        response_deserializer=pb.AttachResponse.FromString,
    )
    call = method(metadata=metadata)
    try:
        subscribe = pb.Subscribe(read=_request(wanted), credit=pb.Credit(events=wanted.window or 0))
        await call.write(pb.AttachRequest(id="w", subscribe=subscribe))
        async for item in _items(call, wanted):
            match item.WhichOneof("kind"):
                case "subscribed":
                    wanted.opened(200)
                case "read":
                    count = _take(wanted, item.read.frames)
                    if count:
                        await call.write(pb.AttachRequest(id="w", credit=pb.Credit(events=count)))
                case "problem":
                    raise Refused(item.problem.status, item.problem.detail)
                case "ended":
                    if item.ended.reason in ("complete", "terminal"):
                        wanted.over()
                    return
    finally:
        call.cancel()


async def _items(call: Any, wanted: Wanted) -> AsyncIterator[Any]:
    while not wanted.there():
        async with asyncio.timeout(slow_for(_QUIET)):
            response = await call.read()
        if response is grpc.aio.EOF:
            return
        for item in response.items:
            yield item


def _take(wanted: Wanted, frames: Any) -> int:
    """Handle a response; return the number of its events."""
    count = 0
    for frame in frames:
        match frame.WhichOneof("kind"):
            case "event":
                event = frame.event
                count += 1
                text = event.delta.text if event.WhichOneof("kind") == "delta" else ""
                wanted.got(
                    Got(
                        watch=-1,
                        cursor=event.cursor,
                        generation=event.generation,
                        epoch=event.epoch,
                        seq=event.seq,
                        type=event.type,
                        text=text,
                    )
                )
            case "gap":
                wanted.said("gap", frame.gap.reason)
            case "bye":
                wanted.said("bye", frame.bye.reason)
    return count
