"""Authenticate a credential as a principal: one port for every protocol."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.kit.auth import metrics
from services.kit.auth.api_keys import KEY_PREFIX, matches, parse
from services.kit.auth.jwt_verifier import CredentialRefused, JwtVerifier
from services.kit.auth.key_table import KeyTable
from services.kit.auth.principal import CHALLENGE, Principal
from services.kit.auth.tickets import TicketScope, issue_ticket, read_ticket
from services.kit.clock import Clock
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem
from services.kit.shutdown import end

__all__ = ["Authenticator"]

_SCHEME: Final = "bearer"


class Authenticator:
    """Authenticate callers. ``everybody``: the principal of all callers without authentication; ``None`` requires
    credentials.

    ``is_local``: no credentials are required because only this machine reaches the service.
    """

    def __init__(
        self,
        clock: Clock,
        keys: KeyTable,
        tokens: JwtVerifier | None = None,
        *,
        everybody: Principal | None = None,
        is_local: bool = False,
    ) -> None:
        self.keys = keys
        self.everybody = everybody
        self.is_local = is_local
        self._clock = clock
        self._tokens = tokens

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        """Return the principal of a caller. ``authorization``: the value of that header (``Bearer …``); it takes
        precedence over a ticket.

        Raises:
            Problem: 401, none or no valid credentials; 503, they cannot be checked now.
        """
        if self.everybody is not None:
            return self.everybody
        try:
            principal = await self._principal(authorization, ticket)
        except CredentialRefused as refused:
            metrics.REFUSED.labels(refused.reason).inc()
            challenge = CHALLENGE + (', error="invalid_token"' if authorization or ticket else "")
            raise Problem(401, str(refused), headers={"WWW-Authenticate": challenge}) from None
        except BrokerUnavailable:
            metrics.REFUSED.labels("unavailable").inc()
            raise Problem(503, "the credentials cannot be checked now", headers={"Retry-After": "1"}) from None
        return principal

    def is_valid(self, principal: Principal) -> bool:
        """Return whether valid credentials have, by the cached keys, neither expired nor been revoked since."""
        if principal.expires_at is not None and principal.expires_at <= self._clock.wall():
            return False
        id_ = principal.key.removeprefix(KEY_PREFIX)
        return id_ == principal.key or self.keys.get(id_) is not None

    def on_revoked(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Call ``callback`` with the `Principal.key` values of revoked API keys, within a second."""
        self.keys.on_revoked(lambda ids: callback(frozenset(KEY_PREFIX + id_ for id_ in ids)))

    async def ticket(
        self, principal: Principal, sessions: tuple[str, ...], scopes: frozenset[TicketScope], expires_at: float
    ) -> str:
        """Issue a ticket for the principal, narrowed to ``sessions`` and ``scopes``.

        Raises:
            BrokerUnavailable: the secret that replicas share cannot be read.
        """
        return issue_ticket(await self.keys.ticket_secret(), principal, sessions, scopes, expires_at)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the keys, and follow their changes while the block runs.

        Raises:
            BrokerUnavailable: they cannot be read.
        """
        await self.keys.poll()
        follower = asyncio.create_task(self.keys.run(), name="api-keys")
        try:
            yield
        finally:
            await end(follower)
            if self._tokens is not None:
                await self._tokens.close()

    async def _principal(self, authorization: str | None, ticket: str | None) -> Principal:
        if authorization is None:
            if ticket is None:
                raise CredentialRefused("missing", "no credentials were given: send `Authorization: Bearer …`")
            return await self._by_ticket(ticket)
        scheme, _, credential = authorization.strip().partition(" ")
        credential = credential.strip()
        if scheme.lower() != _SCHEME or not credential:
            raise CredentialRefused("scheme", "the Authorization header must be `Bearer` and a key or token")
        if credential.startswith(KEY_PREFIX):
            return await self._by_key(credential)
        if self._tokens is None:
            raise CredentialRefused("malformed", "the credentials are no API key, and tokens are not accepted here")
        return await self._tokens.verify(credential)

    async def _by_key(self, credential: str) -> Principal:
        parsed = parse(credential)
        record = await self.keys.find(parsed[0]) if parsed else None
        if parsed is None or record is None or not matches(record, parsed[1]):
            raise CredentialRefused("key", "the API key is not valid")
        if record.expires_at is not None and record.expires_at <= self._clock.wall():
            raise CredentialRefused("expired", "the API key has expired")
        return record.principal()

    async def _by_ticket(self, ticket: str) -> Principal:
        try:
            principal = read_ticket(await self.keys.ticket_secret(), ticket)
        except CredentialRefused as refused:
            if refused.reason != "ticket":
                raise
            principal = read_ticket(await self.keys.ticket_secret(again=True), ticket)
        await self._check_source(principal)
        return principal

    async def _check_source(self, principal: Principal) -> None:
        """Refuse a ticket whose source credential is no longer valid."""
        if principal.expires_at is not None and principal.expires_at <= self._clock.wall():
            raise CredentialRefused("ticket_expired", "the credential that issued the ticket has expired")
        if (
            principal.key.startswith(KEY_PREFIX)
            and await self.keys.find(principal.key.removeprefix(KEY_PREFIX)) is None
        ):
            raise CredentialRefused("revoked", "the API key that issued the ticket is revoked")
