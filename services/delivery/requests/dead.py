"""Read and remove dead requests: those that no producer could run."""

from typing import Final

import msgspec

from schemas.names import InvalidName, check_name
from schemas.requests import Request
from schemas.subjects import dead_filter, dead_subject
from schemas.topology import DEAD
from services.delivery.errors import Unknown
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker, Stored
from services.kit.stamps import nanoseconds

__all__ = ["REASON", "Dead", "DeadRequests"]

REASON: Final = "Tailrace-Reason"
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Owned(msgspec.Struct):
    """Owner of a request, readable even if the rest is not."""

    tenant: str


class Dead(msgspec.Struct, frozen=True, kw_only=True):
    """One dead request. ``died_at``: time of dead-lettering, in seconds since 1970.

    ``request`` is ``None`` when the request cannot be read; ``tenant`` when its owner cannot be read either.
    """

    seq: int
    generation: str
    reason: str
    died_at: float
    data: bytes
    tenant: str | None
    request: Request | None


class DeadRequests:
    """Give a principal access to its dead requests in a pool.

    Requests without a readable tenant or session need the scope ``admin`` and access to all sessions.
    Every method raises `BrokerUnavailable` when the broker does not answer.
    """

    def __init__(self, broker: Broker, principal: Principal, pool: str) -> None:
        self._broker = broker
        self._principal = principal
        self._pool = pool

    async def page(self, limit: int, after: int) -> tuple[list[Dead], int | None]:
        """Return up to ``limit`` requests after the stream sequence ``after``, oldest first.

        The second value is ``after`` of the next page; ``None`` at the end.
        """
        found: list[Dead] = []
        async for batch in self._broker.read(DEAD, dead_filter(self._pool), after + 1):
            for stored in batch:
                if self._is_foreign(_owner(stored.data)):
                    continue  # saves a request to the broker
                dead = await self._last(stored.subject)
                if dead is None or dead.seq != stored.seq:
                    continue  # removed meanwhile, or dead-lettered twice: the later one counts
                if not self._reaches(dead):
                    continue
                if len(found) == limit:
                    return found, found[-1].seq
                found.append(dead)
        return found, None

    async def get(self, generation: str) -> Dead:
        """Return the dead request of a generation.

        Raises:
            Unknown: there is none, or it belongs to another tenant.
        """
        dead = await self._last(dead_subject(self._pool, generation))
        if dead is None or self._is_foreign(dead.tenant) or not self._reaches(dead):
            raise Unknown(f"there is no dead request of a generation {generation!r}")
        return dead

    async def drop(self, generation: str) -> None:
        """Remove the dead request of a generation permanently. Without one this does nothing."""
        await self._broker.purge(DEAD, dead_subject(self._pool, generation))

    def _is_foreign(self, tenant: str | None) -> bool:
        return tenant not in (None, self._principal.tenant)

    def _reaches(self, dead: Dead) -> bool:
        principal = self._principal
        if dead.tenant is None or dead.request is None:
            return "admin" in principal.scopes and principal.reaches_all
        return principal.reaches(dead.request.session)

    async def _last(self, subject: str) -> Dead | None:
        stored = await self._broker.last(DEAD, subject)
        return None if stored is None else _dead(stored)


def _dead(stored: Stored) -> Dead:
    return Dead(
        seq=stored.seq,
        generation=stored.subject.rsplit(".", 1)[-1],
        reason=(stored.headers or {}).get(REASON, ""),
        died_at=nanoseconds(stored.time) / 1e9,
        data=stored.data,
        tenant=_owner(stored.data),
        request=_readable(stored.data),
    )


def _owner(data: bytes) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Owned).tenant
    except _UNREADABLE:
        return None


def _readable(data: bytes) -> Request | None:
    try:
        request = msgspec.json.decode(data, type=Request)
        for role, name in (("session", request.session), ("generation", request.generation)):
            check_name(role, name)
    except (*_UNREADABLE, InvalidName):
        return None
    return request
