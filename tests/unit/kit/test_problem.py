"""Errors as problem details, over a real application."""

from typing import Any

import msgspec
import pytest
from litestar import Litestar, get, post
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.testing import TestClient

from services.kit.problem import EXCEPTION_HANDLERS, Problem, ProblemDetails, problem_bytes


class Body(msgspec.Struct):
    name: str
    size: int


@get("/gone", sync_to_thread=False)
def gone() -> None:
    raise Problem(
        410, "the log was created again", slug="cursor-expired", title="Cursor expired", headers={"X-Why": "x"}
    )


@get("/busy", sync_to_thread=False)
def busy() -> None:
    raise HTTPException("later", status_code=503, headers={"Retry-After": "3"})


@get("/private", sync_to_thread=False)
def private() -> None:
    raise NotAuthorizedException("who are you?")


@get("/broken", sync_to_thread=False)
def broken() -> None:
    raise RuntimeError("the secret reason")


@get("/number/{number:int}", sync_to_thread=False)
def number(number: FromPath[int], limit: FromQuery[int] = 1) -> int:
    return number * limit


@post("/things", sync_to_thread=False)
def things(data: JSONBody[Body]) -> str:
    return data.name


@pytest.fixture
def client() -> Any:
    app = Litestar(
        [gone, busy, private, broken, number, things],
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=1_000,
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["type"].startswith("urn:tailrace:problem:")
    assert body["title"]
    msgspec.convert(body, ProblemDetails)
    return body


def test_a_problem_is_answered_with_its_type_title_detail_and_headers(client: Any) -> None:
    response = client.get("/gone")
    assert problem(response, 410) == {
        "type": "urn:tailrace:problem:cursor-expired",
        "title": "Cursor expired",
        "status": 410,
        "detail": "the log was created again",
    }
    assert response.headers["x-why"] == "x"


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/number/one", 404, "not-found"),
        ("DELETE", "/gone", 405, "method-not-allowed"),
        ("GET", "/private", 401, "unauthenticated"),
        ("GET", "/number/1?limit=x", 400, "bad-request"),
        ("GET", "/busy", 503, "unavailable"),
        ("GET", "/broken", 500, "internal"),
    ],
)
def test_every_error_is_a_problem(client: Any, method: str, path: str, status: int, slug: str) -> None:
    body = problem(client.request(method, path), status)
    assert body["type"] == f"urn:tailrace:problem:{slug}"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"name": 7, "size": 1}', b'{"name": "x"}', b"\xff\xfe", b"null"]
)
def test_a_bad_body_is_the_clients_fault(client: Any, content: bytes) -> None:
    response = client.post("/things", content=content, headers={"content-type": "application/json"})
    assert problem(response, 400)["detail"]


def test_a_body_beyond_the_limit_is_too_large(client: Any) -> None:
    response = client.post("/things", content=b"x" * 2_000, headers={"content-type": "application/json"})
    assert problem(response, 413)["type"] == "urn:tailrace:problem:too-large"


def test_faults_are_listed_one_by_one(client: Any) -> None:
    body = problem(client.get("/number/1?limit=x"), 400)
    assert [fault["key"] for fault in body["errors"]] == ["limit"]
    assert "limit" in body["detail"]


def test_an_unexpected_error_does_not_reveal_its_reason(client: Any) -> None:
    assert "secret" not in client.get("/broken").text


def test_headers_of_an_http_error_are_kept(client: Any) -> None:
    assert client.get("/busy").headers["retry-after"] == "3"


def test_a_status_without_a_name_of_its_own_is_still_a_problem() -> None:
    details = msgspec.json.decode(problem_bytes(Problem(418, "short and stout")), type=ProblemDetails)
    assert (details.type, details.status, details.detail) == ("urn:tailrace:problem:error", 418, "short and stout")
