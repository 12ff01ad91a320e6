"""Budget admission: decide which generations may begin, and stop those beyond a hard limit."""

import asyncio
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final, TypeVar

import msgspec
import structlog

from schemas.budgets import RELEASE_SUBJECT, RESERVE_SUBJECT, Decision, Release, Reserve, budgets_key
from schemas.control import HEARD, OVER_BUDGET
from schemas.subjects import control_subject
from schemas.topology import REGISTRY_BUCKET
from services.billing import metrics
from services.billing.adapters.budgets import Budgets, Running
from services.billing.core.budgets import TOKENS, Budget, Standing, Use, Verdict, beyond, need_of, period_at
from services.billing.core.money import render
from services.billing.errors import LedgerUnavailable
from services.billing.terms import CurrentTerms
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Message
from services.kit.jetstream.errors import APIError
from services.kit.shutdown import end

__all__ = ["Admission"]

log = structlog.get_logger()
QUEUE: Final = "billing"
BATCH: Final = 100
WAITING: Final = 2_000
WATCH_SECONDS: Final = 0.5
EXPIRE_SECONDS: Final = 30.0
T = TypeVar("T")


class Admission:
    """Answer delivery's reservation requests on the broker; the replicas of billing share them.

    ``keep``: seconds until the reservation of a generation that never began is released.
    """

    def __init__(self, broker: Broker, budgets: Budgets, terms: CurrentTerms, clock: Clock, *, keep: float) -> None:
        self._broker = broker
        self._budgets = budgets
        self._terms = terms
        self._clock = clock
        self._keep = keep
        self._asked: asyncio.Queue[tuple[Message, Reserve]] = asyncio.Queue(WAITING)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve requests and watch running generations until ``stop`` is set."""
        subscriptions = [
            await self._broker.subscribe(RESERVE_SUBJECT, self._ask, queue=QUEUE),
            await self._broker.subscribe(RELEASE_SUBJECT, self._release, queue=QUEUE),
        ]
        deciding = asyncio.create_task(self._decide())
        watching = asyncio.create_task(self._watch(stop))
        try:
            done, _ = await asyncio.wait((deciding, watching), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(deciding, watching)
            for subscription in subscriptions:
                await self._broker.unsubscribe(subscription)

    async def notify(self, tenant: str, *, has_budgets: bool) -> None:
        """Publish whether delivery must request reservations for this tenant.

        Raises:
            BrokerUnavailable: the broker does not answer, or does not store it.
        """
        subject = f"$KV.{REGISTRY_BUCKET}.{budgets_key(tenant)}"
        try:
            await self._broker.publish_stored(subject, b"1" if has_budgets else b"")
        except APIError as error:
            raise BrokerUnavailable(f"the broker does not store whether there are budgets: {error}") from error

    async def _watch(self, stop: asyncio.Event) -> None:
        notified, due = False, 0.0
        while not stop.is_set():
            try:
                if not notified:
                    for tenant in await self._budgets.tenants():
                        await self.notify(tenant, has_budgets=True)
                    notified = True
                if self._clock.monotonic() >= due:
                    due = self._clock.monotonic() + EXPIRE_SECONDS
                    await self._expire()
                await self.stop_beyond()
            except (LedgerUnavailable, BrokerUnavailable) as error:
                log.warning("budgets not checked", error=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await stop.wait()

    async def _expire(self) -> None:
        count = await self._budgets.expire(self._now())
        if count:
            log.info("expired reservations released", rows=count)

    async def stop_beyond(self) -> None:
        """Stop running generations beyond a hard limit; one that ends in the meantime is not affected."""
        running = await self._budgets.running()
        for tenant in sorted({r.generation.tenant for r in running}):
            own = [r for r in running if r.generation.tenant == tenant]
            for standing in await self._budgets.standings(tenant, self._now()):
                uses = [self._use(r, standing.budget.unit) for r in own]
                for key in beyond(standing, uses):
                    await self._stop(key, standing)

    def _use(self, running: Running, unit: str) -> Use:
        g = running.generation
        so_far = Reserve(
            tenant=g.tenant,
            session=g.session,
            generation=g.generation,
            models=[f"{g.provider}/{g.upstream_model or g.model}"],
            input=g.counted_input,
            output=g.counted_output,
        )
        used = need_of(so_far, self._terms.now.book, g.started_at or self._now()).of(unit)
        reserved = Decimal(running.tokens) if unit == TOKENS else running.money.get(unit, Decimal(0))
        return Use((g.tenant, g.session, g.generation), g.credential, used, reserved)

    async def _stop(self, key: tuple[str, str, str], standing: Standing) -> None:
        tenant, session, generation = key
        answer = await self._broker.request(control_subject(tenant, session, generation), OVER_BUDGET)
        if answer == HEARD:
            metrics.OVER_BUDGET.inc()
            log.warning(
                "stopped at a hard limit",
                tenant=tenant,
                session=session,
                generation=generation,
                budget=standing.budget.name,
            )

    async def _ask(self, msg: Message) -> None:
        reserve = _read(msg, Reserve)
        if reserve is None:
            return
        try:
            self._asked.put_nowait((msg, reserve))
        except asyncio.QueueFull:
            metrics.RESERVATIONS.labels("unanswered").inc()
            log.warning(
                "no decision on a reservation", generation=reserve.generation, error="too many requests are waiting"
            )

    async def _decide(self) -> None:
        """Decide on all waiting requests, with one transaction per tenant."""
        while True:
            asked = [await self._asked.get()]
            while len(asked) < BATCH and not self._asked.empty():
                asked.append(self._asked.get_nowait())
            tenants: dict[str, list[tuple[Message, Reserve]]] = {}
            for msg, reserve in asked:
                tenants.setdefault(reserve.tenant, []).append((msg, reserve))
            for tenant, own in tenants.items():
                await self._reserve(tenant, own)

    async def _reserve(self, tenant: str, asked: list[tuple[Message, Reserve]]) -> None:
        now = self._now()
        try:
            book = (await self._terms.refresh()).book
            reserves = [(reserve, need_of(reserve, book, now)) for _, reserve in asked]
            verdicts = await self._budgets.reserve(tenant, reserves, now, now + round(self._keep * 1_000))
        except LedgerUnavailable as error:
            metrics.RESERVATIONS.labels("unanswered").inc(len(asked))
            log.warning("no decision on reservations", tenant=tenant, count=len(asked), error=str(error))
            return
        for (msg, _), verdict in zip(asked, verdicts, strict=True):
            await self._answer(msg, _decision(verdict, now))

    async def _release(self, msg: Message) -> None:
        reserve = _read(msg, Release)
        if reserve is None:
            return
        try:
            await self._budgets.release(reserve)
        except LedgerUnavailable as error:
            log.warning("reservation not released yet", generation=reserve.generation, error=str(error))
            return
        await self._answer(msg, None)

    async def _answer(self, msg: Message, decision: Decision | None) -> None:
        if msg.reply:
            try:
                await self._broker.publish(msg.reply, b"" if decision is None else msgspec.json.encode(decision))
            except BrokerUnavailable as error:
                log.warning("decision not sent", error=str(error))

    def _now(self) -> int:
        return round(self._clock.wall() * 1_000)


def _read(msg: Message, type_: type[T]) -> T | None:
    try:
        return msgspec.json.decode(msg.data, type=type_)
    except msgspec.DecodeError as error:
        log.error("budget request not readable", subject=msg.subject, error=str(error))
        return None


def _decision(verdict: Verdict, now: int) -> Decision:
    if verdict.refused is not None:
        metrics.RESERVATIONS.labels("refused").inc()
        return _refused(verdict.refused, now)
    metrics.RESERVATIONS.labels("admitted").inc()
    return _admitted(verdict.passed, now)


def _refused(standing: Standing, now: int) -> Decision:
    budget = standing.budget
    return Decision(
        admitted=False,
        budget=budget.name,
        detail=f"budget {budget.name!r} has no room for this: {_in_words(standing)}",
        until=period_at(budget.period, now)[1] / 1_000,
    )


def _admitted(passed: Standing | None, now: int) -> Decision:
    if passed is None:
        return Decision(admitted=True)
    budget = passed.budget
    return Decision(
        admitted=True,
        budget=budget.name,
        detail=f"budget {budget.name!r} is past its soft limit: {_in_words(passed)}",
        until=period_at(budget.period, now)[1] / 1_000,
    )


def _in_words(standing: Standing) -> str:
    budget: Budget = standing.budget
    limit: Any = budget.hard if budget.hard is not None else budget.soft
    used, held = render(standing.spent), render(standing.reserved)
    return f"{used} {budget.unit} used and {held} reserved of {render(limit)} this {budget.period}"
