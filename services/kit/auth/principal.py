"""The principal of a request: its tenant, its scopes, and the sessions it may access."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec

from services.kit.problem import Problem

__all__ = [
    "CHALLENGE",
    "PRINCIPAL",
    "SCOPES",
    "STILL_VALID",
    "Principal",
    "Scope",
    "authorize",
    "is_still_valid",
    "principal_of",
    "session_patterns",
]

Scope = Literal["start", "read", "cancel", "consume", "usage", "admin"]
SCOPES: Final[frozenset[Scope]] = frozenset({"start", "read", "cancel", "consume", "usage", "admin"})
PRINCIPAL: Final = "tailrace.principal"
"""ASGI scope key of a request's principal, or of the `Problem` with its credentials."""
STILL_VALID: Final = "tailrace.still-valid"
"""ASGI scope key of a function that returns whether the credentials are still valid."""
CHALLENGE: Final = 'Bearer realm="tailrace"'
_PATTERN: Final = re.compile(r"[A-Za-z0-9_*-]{1,64}")
_PATTERNS: Final = 100


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The tenant and permissions of a credential.

    ``key`` names the credential for limits and bills, never its secret: ``tr_<id>`` of an API key, ``jwt:<sub>``.
    ``sessions`` are patterns with ``*`` of the accessible sessions. ``expires_at``: end of the streams it opened, in
    seconds since 1970; ``None``: never. ``operator``: it may manage the keys of every tenant.
    """

    tenant: str
    key: str = ""
    scopes: frozenset[Scope] = SCOPES
    sessions: tuple[str, ...] = ("*",)
    expires_at: float | None = None
    operator: bool = False

    @property
    def reaches_all(self) -> bool:
        """Return whether it may access every session of the tenant."""
        return "*" in self.sessions

    def reaches(self, session: str) -> bool:
        """Return whether it may access a session."""
        return any(pattern == "*" or fnmatchcase(session, pattern) for pattern in self.sessions)


def session_patterns(patterns: Iterable[object]) -> tuple[str, ...]:
    """Validate session patterns.

    Raises:
        ValueError: there are none or too many, or one has characters that no session's name has.
    """
    found = tuple(dict.fromkeys(str(pattern) for pattern in patterns))
    if not 0 < len(found) <= _PATTERNS or not all(_PATTERN.fullmatch(pattern) for pattern in found):
        raise ValueError(f"sessions must be 1 to {_PATTERNS} patterns of letters, digits, '_', '-' and '*'")
    return found


def principal_of(scope: Mapping[str, Any]) -> Principal:
    """Return the principal of a request.

    Raises:
        Problem: 401, the credentials are missing or invalid; or another problem with them.
    """
    principal = scope.get(PRINCIPAL)
    if isinstance(principal, Problem):
        raise principal
    if not isinstance(principal, Principal):
        raise Problem(401, "no credentials were given", headers={"WWW-Authenticate": CHALLENGE})
    return principal


def is_still_valid(scope: Mapping[str, Any]) -> bool:
    """Return whether the credentials of an open request have neither expired nor been revoked meanwhile."""
    check = scope.get(STILL_VALID)
    return check is None or bool(check())


def authorize(principal: Principal, needed: Scope, session: str | None = None) -> Principal:
    """Return the principal if it has the scope and may access the session.

    Raises:
        Problem: 403 without the scope; 404 for an inaccessible session, as if it did not exist.
    """
    if needed not in principal.scopes:
        raise Problem(403, f"the credentials lack the scope {needed!r}")
    if session is not None and not principal.reaches(session):
        raise Problem(404, f"there is no session {session!r}")
    return principal
