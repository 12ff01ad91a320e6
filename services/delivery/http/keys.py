"""Serve the HTTP API of API keys: create, list and revoke, with the scope ``admin``."""

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, FromPath

from schemas.names import check_readable
from services.delivery.errors import named, reach
from services.delivery.http.responses import PROBLEMS
from services.kit.auth.api_keys import KeyRecord, SessionPattern, mint
from services.kit.auth.authenticator import Authenticator
from services.kit.auth.guards import caller, needs
from services.kit.auth.key_table import TooManyKeys
from services.kit.auth.principal import Principal, Scope, session_patterns
from services.kit.clock import Clock
from services.kit.problem import Problem, ProblemDetails

__all__ = ["Key", "KeyList", "KeySpec", "NewKey", "keys_router"]

_YEARS: Final = 10 * 366 * 86_400.0
_EXAMPLE: Final = {"name": "web backend", "scopes": ["start", "read", "cancel"], "sessions": ["chat-*"]}
_FULL: Final = ResponseSpec(
    ProblemDetails, description="The largest number of keys exists", media_type="application/problem+json"
)


class KeySpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A key to make. ``expires_in``: seconds from now; without it the key lasts until it is revoked.

    ``tenant``: only the operator may name another tenant.
    """

    name: Annotated[str, msgspec.Meta(max_length=100)] = ""
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1, max_length=6)]
    sessions: Annotated[list[SessionPattern], msgspec.Meta(min_length=1, max_length=100)] = msgspec.field(
        default_factory=lambda: ["*"]
    )
    expires_in: Annotated[float, msgspec.Meta(ge=1, le=_YEARS)] | None = None
    tenant: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None

    def __post_init__(self) -> None:
        check_readable("name", self.name)


class Key(msgspec.Struct, kw_only=True):
    """An API key without its secret. Times in seconds since 1970."""

    id: str
    tenant: str
    name: str
    scopes: list[Scope]
    sessions: list[str]
    created_at: float
    expires_at: float | None


class NewKey(Key, kw_only=True):
    """A new API key. ``key`` is shown this once: only its hash is kept."""

    key: str


class KeyList(msgspec.Struct):
    """API keys, oldest first."""

    keys: list[Key]


def keys_router(authenticator: Authenticator, clock: Clock) -> Router:
    """Return the routes under ``/v1/keys``."""
    return Router("/v1/keys", route_handlers=_handlers(authenticator, clock), tags=["keys"])


def _handlers(authenticator: Authenticator, clock: Clock) -> list[HTTPRouteHandler]:
    table = authenticator.keys

    @post(
        "/", summary="Create an API key", operation_id="createKey", responses=PROBLEMS | {409: _FULL}, **needs("admin")
    )
    async def create_key(
        request: Request[Any, Any, Any],
        data: Annotated[KeySpec, Body(examples=[Example(summary="For a backend", value=_EXAMPLE)])],
    ) -> NewKey:
        id_, text, hash_ = mint()
        record = _record(caller(request), data, id_, hash_, clock.wall())
        try:
            await reach(table.create(record))
        except TooManyKeys as error:
            raise Problem(409, str(error), slug="too-many-keys") from error
        return NewKey(key=text, **_fields(record))

    @get("/", summary="List API keys", operation_id="listKeys", responses=PROBLEMS, **needs("admin"))
    async def list_keys(request: Request[Any, Any, Any]) -> KeyList:
        principal = caller(request)
        return KeyList([Key(**_fields(r)) for r in await reach(table.everything()) if _governs(principal, r)])

    @delete("/{key:str}", summary="Revoke an API key", operation_id="revokeKey", responses=PROBLEMS, **needs("admin"))
    async def revoke_key(request: Request[Any, Any, Any], key: FromPath[str]) -> None:
        named("key", key)
        found = {record.id: record for record in await reach(table.everything())}.get(key)
        if found is None or not _governs(caller(request), found):
            raise Problem(404, f"there is no API key {key!r}")
        await reach(table.revoke(key))

    return [create_key, list_keys, revoke_key]


def _governs(principal: Principal, record: KeyRecord) -> bool:
    return principal.operator or principal.tenant == record.tenant


def _fields(record: KeyRecord) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in Key.__struct_fields__}
    return fields | {"scopes": list(record.scopes), "sessions": list(record.sessions)}


def _record(principal: Principal, spec: KeySpec, id_: str, hash_: str, now: float) -> KeyRecord:
    """Return the record of a new key. It cannot have more rights than the principal.

    Raises:
        Problem: 400 for names that are not valid, 403 for rights that the principal does not have.
    """
    tenant = spec.tenant or principal.tenant
    named("tenant", tenant)
    if tenant != principal.tenant and not principal.operator:
        raise Problem(403, "only the operator can create keys of another tenant")
    beyond = sorted(set(spec.scopes) - principal.scopes)
    if beyond:
        raise Problem(403, f"the credentials lack the scope {beyond[0]!r}, so they cannot create a key with it")
    try:
        sessions = session_patterns(spec.sessions)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    if not principal.reaches_all and not set(sessions) <= set(principal.sessions):
        raise Problem(403, "the credentials cannot create a key for sessions that they do not reach")
    return KeyRecord(
        id=id_,
        tenant=tenant,
        name=spec.name,
        scopes=tuple(sorted(set(spec.scopes))),
        sessions=sessions,
        hash=hash_,
        created_at=now,
        expires_at=None if spec.expires_in is None else now + spec.expires_in,
    )
