"""Live running totals: one database query per tenant and period, for any number of listeners."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
import structlog
from litestar import Request, get
from litestar.datastructures import State
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import ServerSentEvent, ServerSentEventMessage

from services.billing.adapters.reports import Reports, Totals
from services.billing.core.question import Filters
from services.billing.core.spending import DAY, OPEN
from services.billing.errors import LedgerUnavailable
from services.billing.responses import PROBLEMS, only
from services.kit.auth.guards import caller, needs
from services.kit.auth.principal import is_still_valid
from services.kit.clock import Clock
from services.kit.problem import Problem

__all__ = ["Live", "LiveTotals", "live_usage"]

log = structlog.get_logger()
PERIOD: Final = 0.4
"""Seconds between two reads of the database; the totals are at most half a second old."""
LISTENERS: Final = 1_000
HEARTBEAT: Final = 15.0


class LiveTotals(msgspec.Struct, kw_only=True):
    """Totals of generations that started today (UTC), and of those among them that have not settled.

    ``at`` in seconds since 1970.
    """

    at: float
    day: str
    totals: Totals
    running: Totals


class Live:
    """Share the totals of each tenant among its listeners; at most `LISTENERS` at once."""

    def __init__(self, reports: Reports, clock: Clock) -> None:
        self._reports = reports
        self._clock = clock
        self._listeners = 0
        self._newest: dict[str, tuple[float, asyncio.Task[LiveTotals]]] = {}  # by tenants with listeners
        self._counts: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """Add a listener.

        Raises:
            Problem: 503, too many listeners.
        """
        if self._listeners >= LISTENERS:
            raise Problem(503, f"there are {LISTENERS} listeners already", headers={"Retry-After": "5"})
        self._listeners += 1
        self._counts[tenant] = self._counts.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """Remove a listener."""
        self._listeners -= 1
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
            self._newest.pop(tenant, None)

    async def totals(self, tenant: str) -> LiveTotals:
        """Return the latest totals, from one query shared by all listeners of the tenant.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        now = self._clock.monotonic()
        known = self._newest.get(tenant)
        if known is None or now - known[0] >= PERIOD:
            known = self._newest[tenant] = (now, asyncio.create_task(self._ask(tenant)))
        return await asyncio.shield(known[1])

    async def _ask(self, tenant: str) -> LiveTotals:
        wall = self._clock.wall()
        start = int(wall * 1_000) // DAY * DAY
        by_status = await self._reports.groups(Filters(tenant=tenant, start=start), ("status",), None, 100)
        whole, running = Totals(), Totals()
        for (status,), totals in by_status:
            _add(whole, totals)
            if status in OPEN:
                _add(running, totals)
        day = datetime.fromtimestamp(start / 1_000, UTC).strftime("%Y-%m-%d")
        return LiveTotals(at=round(wall, 3), day=day, totals=whole, running=running)


def _add(to: Totals, totals: Totals) -> None:
    for name in Totals.__struct_fields__:
        if name != "amounts":
            setattr(to, name, getattr(to, name) + getattr(totals, name))
    amounts = dict(to.amounts)
    for currency, amount in totals.amounts.items():
        amounts[currency] = f"{Decimal(amounts.get(currency, '0')) + Decimal(amount):f}"
    to.amounts = amounts


@get(
    "/live",
    summary="Today's usage as it grows",
    operation_id="live_usage",
    tags=["usage"],
    responses=PROBLEMS | {200: ResponseSpec(str, description="The stream", media_type="text/event-stream")},
    **needs("usage"),
)
async def live_usage(request: Request[Any, Any, Any], state: State) -> ServerSentEvent:
    """Server-sent events: running totals (`LiveTotals`) after each change, within a second of the token."""
    only(request, ())
    principal = caller(request)
    if not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions, and the totals cover all of them")
    live: Live = state.live
    live.enter(principal.tenant)
    return ServerSentEvent(_events(live, principal.tenant, request.scope))


async def _events(live: Live, tenant: str, scope: Mapping[str, Any]) -> Any:
    loop = asyncio.get_running_loop()
    sent: tuple[Totals, Totals] | None = None
    sent_at = loop.time()
    try:
        while True:
            try:
                found = await live.totals(tenant)
            except LedgerUnavailable as error:
                log.warning("live totals not sent", error=str(error))
                yield ServerSentEventMessage(event="bye", data='{"reason":"unavailable"}', retry=2_000)
                return
            if not is_still_valid(scope):
                yield ServerSentEventMessage(event="bye", data='{"reason":"expired"}')
                return
            if (found.totals, found.running) != sent:
                sent, sent_at = (found.totals, found.running), loop.time()
                yield ServerSentEventMessage(data=msgspec.json.encode(found).decode())
            elif loop.time() - sent_at > HEARTBEAT:
                sent_at = loop.time()
                yield ServerSentEventMessage(comment="hb")
            await asyncio.sleep(PERIOD)
    finally:
        live.leave(tenant)
