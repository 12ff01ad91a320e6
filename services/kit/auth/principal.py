"""Who calls: the tenant that pays, what may be done, and to which sessions."""

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
"""Key of the ASGI scope under which the principal of a request stands, or the `Problem` of its credentials."""
STILL_VALID: Final = "tailrace.still-valid"
"""Key of the ASGI scope under which a function tells whether the credentials are good even now."""
CHALLENGE: Final = 'Bearer realm="tailrace"'
_PATTERN: Final = re.compile(r"[A-Za-z0-9_*-]{1,64}")
_PATTERNS: Final = 100


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """What a credential stands for.

    ``key`` names the credential for limits and bills, never its secret: ``tr_<id>`` of an API key, ``jwt:<sub>``.
    ``sessions`` are patterns with ``*`` of the sessions that it may touch. ``expires_at``: when streams that it opened
    must end, in seconds since 1970; ``None``: never. ``operator``: it may manage the keys of every tenant.
    """

    tenant: str
    key: str = ""
    scopes: frozenset[Scope] = SCOPES
    sessions: tuple[str, ...] = ("*",)
    expires_at: float | None = None
    operator: bool = False

    @property
    def reaches_all(self) -> bool:
        """Whether every session of the tenant is one of its own."""
        return "*" in self.sessions

    def reaches(self, session: str) -> bool:
        """Tell whether a session is one of its own."""
        return any(pattern == "*" or fnmatchcase(session, pattern) for pattern in self.sessions)


def session_patterns(patterns: Iterable[object]) -> tuple[str, ...]:
    """Return patterns of sessions, checked.

    Raises:
        ValueError: there are none or too many, or one has characters that no session's name has.
    """
    found = tuple(dict.fromkeys(str(pattern) for pattern in patterns))
    if not 0 < len(found) <= _PATTERNS or not all(_PATTERN.fullmatch(pattern) for pattern in found):
        raise ValueError(f"sessions must be 1 to {_PATTERNS} patterns of letters, digits, '_', '-' and '*'")
    return found


def principal_of(scope: Mapping[str, Any]) -> Principal:
    """Return who calls.

    Raises:
        Problem: 401, the credentials are missing or not valid; or whatever else is wrong with them.
    """
    principal = scope.get(PRINCIPAL)
    if isinstance(principal, Problem):
        raise principal
    if not isinstance(principal, Principal):
        raise Problem(401, "no credentials were given", headers={"WWW-Authenticate": CHALLENGE})
    return principal


def is_still_valid(scope: Mapping[str, Any]) -> bool:
    """Tell whether the credentials of a request that goes on have neither expired nor been revoked meanwhile."""
    check = scope.get(STILL_VALID)
    return check is None or bool(check())


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
