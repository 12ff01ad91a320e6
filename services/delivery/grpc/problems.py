"""Map problems to gRPC: a status code, and the problem details in the trailing metadata."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import structlog

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery import metrics
from services.delivery.errors import DeliveryError, problem_of, unreachable
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem, problem_bytes

__all__ = ["PROBLEM_KEY", "answering", "as_message", "as_problem", "code_of"]

log = structlog.get_logger()
PROBLEM_KEY: Final = "tailrace-problem-bin"
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    402: grpc.StatusCode.RESOURCE_EXHAUSTED,  # a budget has no room
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    410: grpc.StatusCode.OUT_OF_RANGE,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


def code_of(problem: Problem) -> grpc.StatusCode:
    """Return the gRPC status code of a problem."""
    if problem.details.type.endswith(":idempotency-conflict"):
        return grpc.StatusCode.ALREADY_EXISTS
    other = grpc.StatusCode.INTERNAL if problem.status >= 500 else grpc.StatusCode.FAILED_PRECONDITION
    return _CODES.get(problem.status, other)


def as_problem(error: Exception) -> Problem:
    """Return the problem of an error; an unexpected error is logged and becomes a 500 without its text."""
    match error:
        case Problem():
            return error
        case DeliveryError():
            return problem_of(error)
        case BrokerUnavailable():
            return unreachable()
        case _:
            log.error("call failed", exc_info=error)
            return Problem(500, "the error has been logged")


def as_message(problem: Problem) -> pb.Problem:
    """Return a problem as an item of `Attach`."""
    retry = problem.headers.get("Retry-After", "")
    return pb.Problem(
        status=problem.status,
        type=problem.details.type,
        detail=problem.details.detail,
        retry_after=int(retry) if retry.isdigit() else 0,
    )


@asynccontextmanager
async def answering(method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Abort the call with the status of the error that leaves the block."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        problem = as_problem(error)
    else:
        metrics.GRPC_CALLS.labels(method, grpc.StatusCode.OK.name).inc()
        return
    code = code_of(problem)
    metrics.GRPC_CALLS.labels(method, code.name).inc()
    trailing: list[tuple[str, str | bytes]] = [(PROBLEM_KEY, problem_bytes(problem))]
    if "Retry-After" in problem.headers:
        trailing.append(("retry-after", problem.headers["Retry-After"]))
    try:
        await context.abort(code, problem.details.detail or problem.details.title, trailing_metadata=tuple(trailing))
    except grpc.aio.InternalError:
        log.debug("call ended before its error was sent", method=method, detail=problem.details.detail)
