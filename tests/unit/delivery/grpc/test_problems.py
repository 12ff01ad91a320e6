"""Test problems as gRPC statuses and messages."""

import grpc
import pytest

from services.delivery.errors import CursorExpired, Unknown
from services.delivery.grpc.problems import as_message, as_problem, code_of
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "INVALID_ARGUMENT"),
        (401, "UNAUTHENTICATED"),
        (402, "RESOURCE_EXHAUSTED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
        (409, "ABORTED"),
        (410, "OUT_OF_RANGE"),
        (418, "FAILED_PRECONDITION"),
        (422, "FAILED_PRECONDITION"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "INTERNAL"),
        (503, "UNAVAILABLE"),
        (599, "INTERNAL"),
    ],
)
def test_http_status_maps_to_the_equivalent_grpc_code(status: int, code: str) -> None:
    assert code_of(Problem(status, "x")) is grpc.StatusCode[code]


@pytest.mark.parametrize(
    ("error", "status"), [(Unknown("x"), 404), (CursorExpired("x"), 410), (BrokerUnavailable("x"), 503)]
)
def test_expected_errors_keep_their_meaning(error: Exception, status: int) -> None:
    assert as_problem(error).status == status


def test_unexpected_error_is_not_shown() -> None:
    problem = as_problem(ValueError("secret"))
    assert problem.status == 500
    assert "secret" not in problem.details.detail


@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "7"}, 7), ({}, 0), ({"Retry-After": "soon"}, 0)])
def test_problem_item_has_retry_after(headers: dict[str, str], seconds: int) -> None:
    assert as_message(Problem(429, "x", headers=headers)).retry_after == seconds
