"""Who calls: the tenant that pays, what may be done, and to which sessions."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec

from services.kit.problem import Problem

__all__ = ["PRINCIPAL", "SCOPES", "Principal", "Scope", "authorize", "principal_of"]

Scope = Literal["start", "read", "cancel", "consume", "usage", "admin"]
SCOPES: Final[frozenset[str]] = frozenset({"start", "read", "cancel", "consume", "usage", "admin"})
PRINCIPAL: Final = "tailrace.principal"
"""Key of the ASGI scope under which the principal of a request stands."""


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """What a credential stands for.

    ``key`` names the credential for limits and bills, never its secret. ``sessions`` are patterns with ``*`` of the
    sessions that it may touch. ``expires_at``: when streams that it opened must end, in seconds since 1970; ``None``:
    never.
    """

    tenant: str
    key: str = ""
    scopes: frozenset[str] = SCOPES
    sessions: tuple[str, ...] = ("*",)
    expires_at: float | None = None

    def reaches(self, session: str) -> bool:
        """Tell whether a session is one of its own."""
        return any(pattern == "*" or fnmatchcase(session, pattern) for pattern in self.sessions)


def principal_of(scope: Mapping[str, Any]) -> Principal:
    """Return who calls.

    Raises:
        Problem: 401, the request came past what checks credentials.
    """
    principal = scope.get(PRINCIPAL)
    if not isinstance(principal, Principal):
        raise Problem(401, "no credentials were given", headers={"WWW-Authenticate": "Bearer"})
    return principal


def authorize(principal: Principal, needed: Scope, session: str | None = None) -> Principal:
    """Return the principal, if it may do this.

    Raises:
        Problem: 403 without the scope; 404 for a session that is none of its own, as if there were none.
    """
    if needed not in principal.scopes:
        raise Problem(403, f"the credentials lack the scope {needed!r}")
    if session is not None and not principal.reaches(session):
        raise Problem(404, f"there is no session {session!r}")
    return principal
