"""Tickets: short-lived credentials in a URL, for pages that cannot send a header, limited to named sessions.

A ticket is a token of its own type (HMAC, signed by PyJWT), with a secret shared by the replicas. It is valid for
connecting until ``exp``; the stream that it opens lasts no longer than the credential that issued it.
"""

from typing import Annotated, Any, Final, Literal, get_args

import jwt
import msgspec

from services.kit.auth.jwt_verifier import CredentialRefused
from services.kit.auth.principal import Principal

__all__ = ["TICKET_SCOPES", "TicketScope", "issue_ticket", "read_ticket"]

TicketScope = Literal["read", "start", "cancel", "consume"]
TICKET_SCOPES: Final[frozenset[TicketScope]] = frozenset(get_args(TicketScope))
LEEWAY: Final = 2.0  # between the clocks of two replicas
MAX_LENGTH: Final = 8_192
_AUDIENCE: Final = "urn:tailrace:ticket"
_OPTIONS: Final[Any] = {"require": ["exp", "aud"], "enforce_minimum_key_length": True}


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    exp: float
    aud: str
    tenant: str
    key: str
    scopes: tuple[TicketScope, ...]
    sessions: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    until: float | None = None


def issue_ticket(
    secret: bytes,
    principal: Principal,
    sessions: tuple[str, ...],
    scopes: frozenset[TicketScope],
    expires_at: float,
) -> str:
    """Issue a ticket for the principal, narrowed to ``sessions`` and ``scopes``.

    ``expires_at``: end of its validity for connecting, in seconds since 1970.
    """
    content = _Content(
        exp=expires_at,
        aud=_AUDIENCE,
        tenant=principal.tenant,
        key=principal.key,
        scopes=tuple(sorted(scopes)),
        sessions=sessions,
        until=principal.expires_at,
    )
    return jwt.encode(msgspec.to_builtins(content), secret, algorithm="HS256")


def read_ticket(secret: bytes, ticket: str) -> Principal:
    """Return the principal of a ticket; it expires with the credential that issued the ticket.

    Raises:
        CredentialRefused: it is not valid now.
    """
    if len(ticket) > MAX_LENGTH:
        raise CredentialRefused("ticket", "the ticket is not valid")
    try:
        claims = jwt.decode(ticket, secret, algorithms=["HS256"], audience=_AUDIENCE, leeway=LEEWAY, options=_OPTIONS)
        content = msgspec.convert(claims, _Content)
    except jwt.ExpiredSignatureError:
        raise CredentialRefused("ticket_expired", "the ticket has expired: ask for a new one") from None
    except (jwt.PyJWTError, msgspec.ValidationError, ValueError, TypeError, RecursionError):
        raise CredentialRefused("ticket", "the ticket is not valid") from None
    return Principal(
        tenant=content.tenant,
        key=content.key,
        scopes=frozenset(content.scopes),
        sessions=content.sessions,
        expires_at=content.until,
    )
