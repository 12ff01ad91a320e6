"""Implement the methods of `tailrace.v1.Delivery`. Streamed messages are serialized before gRPC gets them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import msgspec

from schemas.names import InvalidName, check_name
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.consumers.registry import Consumers
from services.delivery.fanout.outbox import Outbox
from services.delivery.fanout.streams import Streams
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.formats.protobuf import PROTOBUF, Batch
from services.delivery.grpc.attach import TOO_SLOW, AttachCall, Operation, decoded, read_options_of
from services.delivery.grpc.consume import ConsumeCall
from services.delivery.grpc.problems import answering
from services.delivery.requests.generations import Lookups
from services.delivery.requests.intake import GenerationRequest, Intake
from services.delivery.requests.views import view_of
from services.kit.auth.principal import Principal, authorize
from services.kit.problem import Problem

__all__ = ["SERVICE", "Authenticate", "DeliveryService"]

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Delivery"].full_name
KEY_LIMIT: Final = 200
LAST_WRITE_SECONDS: Final = 5.0

Authenticate = Callable[[str | None], Awaitable[Principal]]
"""Returns the principal for the value of `authorization`; raises `Problem` 401 or 503."""
Context = grpc.aio.ServicerContext[Any, Any]


class DeliveryService:
    """Serve all gRPC methods, with the same streams, lookups and queue as HTTP."""

    def __init__(
        self,
        supervisor: Supervisor,
        streams: Streams,
        lookups: Lookups,
        intake: Intake,
        consumers: Consumers,
        authenticate: Authenticate,
    ) -> None:
        self._supervisor = supervisor
        self._streams = streams
        self._lookups = lookups
        self._intake = intake
        self._consumers = consumers
        self._authenticate = authenticate

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the method handlers; requests and responses are bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Read": grpc.unary_stream_rpc_method_handler(self.read),
                "Attach": grpc.stream_stream_rpc_method_handler(self.attach),
                "Consume": grpc.stream_stream_rpc_method_handler(self.consume),
                "Start": self._unary("Start", self.start, pb.StartRequest),
                "Cancel": self._unary("Cancel", self.cancel, pb.CancelRequest),
                "GetGeneration": self._unary("GetGeneration", self.generation, pb.GetGenerationRequest),
            },
        )

    def is_ready(self) -> bool:
        """Return whether new calls are accepted."""
        return self._supervisor.is_ready()

    async def read(self, data: bytes, context: Context) -> None:
        """Serve one call of `Read` to its end."""
        async with answering("Read", context):
            principal = await self._principal(context)
            stream = await self._streams.open(principal, read_options_of(decoded(pb.ReadRequest, data)))
            await context.send_initial_metadata(())
            if stream.seq is None:
                return
            async with Outbox[bytes](context.write, len, b"".join) as outbox:

                async def send(batch: Batch) -> None:
                    await outbox.send((batch.data,))

                if await self._streams.serve(stream, send, PROTOBUF) == "evicted":
                    raise TOO_SLOW
                if not await outbox.flush(LAST_WRITE_SECONDS):
                    raise TOO_SLOW

    async def attach(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Serve one call of `Attach` to its end."""
        async with answering("Attach", context):
            principal = await self._entering(context)
            async with Outbox[bytes](context.write, len, b"".join) as outbox:
                operations: dict[str, Operation] = {"start": self.start, "cancel": self.cancel}
                end = self._supervisor.end_of(principal.expires_at)
                attachment = AttachCall(self._streams, principal, outbox, operations, end)
                with self._supervisor.supervise(principal, attachment):
                    await attachment.run(requests)

    async def consume(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Serve one call of `Consume` to its end."""
        async with answering("Consume", context):
            principal = await self._entering(context)
            end = self._supervisor.end_of(principal.expires_at)
            async with Outbox[bytes](context.write, len) as outbox:
                consuming = ConsumeCall(self._consumers, principal, outbox, end)
                with self._supervisor.supervise(principal, consuming):
                    await consuming.run(requests)

    async def _entering(self, context: Context) -> Principal:
        """Authenticate a streaming call, check that it may begin, and send the initial metadata.

        Raises:
            Problem: 401, 429 or 503.
        """
        principal = await self._principal(context)
        self._supervisor.check(principal)
        await context.send_initial_metadata(())
        return principal

    async def start(self, principal: Principal, request: pb.StartRequest) -> pb.StartResponse:
        """Queue a request for a generation.

        Raises:
            Problem: the request is not valid, not allowed, or cannot be accepted now.
            BrokerUnavailable: nothing was queued.
        """
        _check("session", request.session)
        if request.HasField("follow"):
            raise Problem(400, "follow belongs to Attach: Start answers once")
        authorize(principal, "start", request.session)
        key = request.idempotency_key or None
        if key is not None and len(key) > KEY_LIMIT:
            raise Problem(400, f"idempotency_key must have at most {KEY_LIMIT} characters")
        generation, cursor, repeated = await self._intake.accept(
            principal, request.session, _generation_request(request), key
        )
        return pb.StartResponse(
            session=request.session, generation=generation, cursor=cursor, state="queued", repeated=repeated
        )

    async def cancel(self, principal: Principal, request: pb.CancelRequest) -> pb.CancelResponse:
        """Request the cancellation of a generation.

        Raises:
            Problem: a name is not valid, or the principal may not cancel it.
            Unknown: the generation does not exist.
            BrokerUnavailable: the request could not be stored.
        """
        _check("session", request.session)
        _check("generation", request.generation)
        authorize(principal, "cancel", request.session)
        state = await self._intake.cancel(principal.tenant, request.session, request.generation)
        return pb.CancelResponse(generation=request.generation, state=state)

    async def generation(self, principal: Principal, request: pb.GetGenerationRequest) -> pb.Generation:
        """Return a generation with its output so far.

        Raises:
            Problem: a name is not valid, or the principal may not read it.
            Unknown: the generation does not exist.
            BrokerUnavailable: the log cannot be read.
        """
        _check("session", request.session)
        _check("generation", request.generation)
        authorize(principal, "read", request.session)
        view = await view_of(self._lookups, principal.tenant, request.session, request.generation)
        return pb.Generation(
            session=view.session,
            generation=view.generation,
            state=view.state,
            text=view.text,
            reasoning=view.reasoning,
            refusal=view.refusal,
            finish_reason=view.finish_reason or "",
            json=msgspec.json.encode(view),
        )

    def _unary(
        self, name: str, method: Callable[[Principal, Any], Awaitable[Any]], request_type: type[Any]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def call(data: bytes, context: Context) -> bytes:
            async with answering(name, context):
                answer = await method(await self._principal(context), decoded(request_type, data))
            return bytes(answer.SerializeToString())

        return grpc.unary_unary_rpc_method_handler(call)

    async def _principal(self, context: Context) -> Principal:
        for name, value in context.invocation_metadata() or ():
            if name == "authorization":
                return await self._authenticate(value if isinstance(value, str) else value.decode("latin-1"))
        return await self._authenticate(None)


def _check(role: str, value: str) -> None:
    try:
        check_name(role, value)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


def _generation_request(request: pb.StartRequest) -> GenerationRequest:
    """Return the generation request, checked by the rules of the HTTP body."""
    try:
        options = msgspec.json.decode(request.options, type=dict[str, Any]) if request.options else {}
        messages = [
            msgspec.json.decode(m.json) if m.json else {"role": m.role, "content": m.content} for m in request.messages
        ]
        fields = {"model": request.model, "messages": messages, "metadata": dict(request.metadata)}
        return msgspec.convert({**fields, **options}, GenerationRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the request is not valid: {error}") from error
