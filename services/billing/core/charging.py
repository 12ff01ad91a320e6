"""From a settled generation to ledger entries: what it is to cost, and what leads there from what was entered before.

The sum of a generation's entries always equals the price of its final usage: entries are never changed, each is the
difference that was missing when it was written.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.usage import Usage, nested
from services.billing.core.generation import EXPORT, Generation, Pricing
from services.billing.core.money import ZERO, AmountTooLarge, render, times
from services.billing.core.prices import PER_REQUEST, TOKEN_CLASSES, Price, PriceBook, TokenClass

__all__ = ["Basis", "Charging", "Entry", "Kind", "Line", "Source", "Tokens", "charge", "disjoint"]

Basis = Literal["counted", "reported", "none"]
Kind = Literal["charge", "correction", "reversal"]
Source = Literal["counted", "reported", "provider_export", "none"]


class Charging(msgspec.Struct, frozen=True, kw_only=True):
    """By which numbers generations are charged that did not complete with a report.

    ``partial``: failed, cancelled and interrupted ones. ``missing``: completed ones whose provider never reported.
    ``tenants``: the same for single tenants, instead of ``partial``.
    """

    partial: Basis = "counted"
    missing: Basis = "counted"
    tenants: dict[str, Basis] = {}

    def of(self, tenant: str) -> Basis:
        """Return the policy for a tenant's partial generations."""
        return self.tenants.get(tenant, self.partial)


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """What is paid for, in classes of which no token is in two."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0
    per_request: int = 1

    @property
    def total(self) -> int:
        """All of them."""
        writes = self.cache_write + self.cache_write_1h
        return self.input + self.cached_input + writes + self.output + self.reasoning


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One class of tokens on the bill: how many, at which row of the price book, for how much."""

    token_class: TokenClass
    count: int
    price: int
    rate: str
    amount: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the ledger. ``number`` counts a generation's entries from 1.

    ``source``: whose numbers; ``rule``: why they hold (status and policy). ``lines``: the bill that ``amount`` leads
    to, as JSON; ``revision``: of the price book. ``created_at`` in milliseconds since 1970.
    """

    tenant: str
    session: str
    generation: str
    number: int
    kind: Kind
    amount: Decimal
    currency: str
    source: Source
    rule: str
    lines: str
    revision: int
    created_at: int


class _Target(NamedTuple):
    """What a generation is to cost; ``amount`` is ``None`` where nothing is to be asked for."""

    pricing: Pricing
    source: Source
    rule: str
    amount: Decimal | None = None
    currency: str = ""
    lines: tuple[Line, ...] = ()
    tokens: int = 0


def charge(g: Generation, now: int, charging: Charging, book: PriceBook) -> tuple[Generation, list[Entry]]:
    """Return ``g`` with its price settled, and the entries that lead there. ``g`` has been reconciled at ``now``."""
    target = _target(g, charging, book)
    if target is None:
        return g, []
    entries = [
        Entry(
            tenant=g.tenant,
            session=g.session,
            generation=g.generation,
            number=g.entries + 1 + at,
            kind=kind,
            amount=amount,
            currency=currency,
            source=target.source,
            rule=target.rule,
            lines=msgspec.json.encode(target.lines).decode(),
            revision=book.revision,
            created_at=now,
        )
        for at, (kind, amount, currency) in enumerate(_steps(g, target))
    ]
    settled = msgspec.structs.replace(
        g,
        pricing=target.pricing,
        amount=ZERO if target.amount is None else target.amount,
        currency=g.currency if target.amount is None else target.currency,
        entries=g.entries + len(entries),
        tokens=target.tokens,
    )
    return settled, entries


def _steps(g: Generation, target: _Target) -> Iterator[tuple[Kind, Decimal, str]]:
    if target.amount is None:
        if g.amount:
            yield "reversal", -g.amount, g.currency
        return
    if not g.entries:
        yield "charge", target.amount, target.currency
    elif g.currency != target.currency:
        if g.amount:
            yield "reversal", -g.amount, g.currency
        yield "charge", target.amount, target.currency
    elif g.pricing != "charged":
        yield "charge", target.amount, target.currency
    elif target.amount != g.amount:
        yield "correction", target.amount - g.amount, target.currency


def _target(g: Generation, charging: Charging, book: PriceBook) -> _Target | None:
    """Return what ``g`` is to cost; ``None`` while that is open."""
    if g.status in ("running", "awaiting_provider"):
        return None
    basis: Basis = "reported"
    rule = f"{g.status}:reported"
    if g.status in ("partial", "provider_missing"):
        basis = charging.of(g.tenant) if g.status == "partial" else charging.missing
        rule = f"{g.state if g.status == 'partial' else g.status}:{basis}"
    if basis == "none" or (basis == "reported" and g.usage is None):
        return _Target("waived", "none", rule)
    if g.status == "partial" and g.usage is None and not g.counted_output:
        return _Target("waived", "none", f"{g.state}:nothing")  # nobody pays for a refusal
    source: Source = "counted" if basis == "counted" else "provider_export" if g.usage_source == EXPORT else "reported"
    tokens = _tokens(g, basis)
    return _priced(tokens, g, book, source, rule)._replace(tokens=tokens.total)


def _tokens(g: Generation, basis: Basis) -> Tokens:
    if basis == "counted" or g.usage is None:
        return Tokens(input=g.counted_input, output=g.counted_output)
    return disjoint(msgspec.json.decode(g.usage, type=Usage))


def disjoint(usage: Usage) -> Tokens:
    """Return a provider's numbers in disjoint classes; where it bills other numbers than it processed, those hold."""
    usage = nested(usage)
    inputs = usage.input if usage.billed_input is None else usage.billed_input
    outputs = usage.output if usage.billed_output is None else usage.billed_output
    cached = min(usage.cached_input, inputs)
    written = min(usage.cache_write, inputs - cached)
    written_1h = min(usage.cache_write_1h, written)
    reasoning = min(usage.reasoning, outputs)
    return Tokens(
        input=inputs - cached - written,
        cached_input=cached,
        cache_write=written - written_1h,
        cache_write_1h=written_1h,
        output=outputs - reasoning,
        reasoning=reasoning,
    )


def _priced(tokens: Tokens, g: Generation, book: PriceBook, source: Source, rule: str) -> _Target:
    unpriced = _Target("unpriced", source, rule)
    rows = book.rows(g.provider, g.upstream_model or g.model, g.started_at)
    if not any(c in rows for c in _SPOKEN) or any(c not in rows and getattr(tokens, c) for c in TOKEN_CLASSES):
        return unpriced
    used = [(c, p) for c, p in rows.items() if getattr(tokens, c)]
    currency, *others = {p.currency for _, p in used} or {rows[c].currency for c in _SPOKEN if c in rows}
    if others:
        return unpriced  # one bill, one currency
    try:
        lines = tuple(_line(c, getattr(tokens, c), p) for c, p in used)
    except AmountTooLarge:
        return unpriced
    return _Target("charged", source, rule, sum((Decimal(line.amount) for line in lines), ZERO), currency, lines)


_SPOKEN: Final[tuple[TokenClass, ...]] = ("input", "output")
"""Without a price for either of these a model has no price, however few tokens it used."""


def _line(token_class: TokenClass, count: int, price: Price) -> Line:
    amount = times(count, price.amount, per_million=token_class != PER_REQUEST)
    return Line(
        token_class=token_class,
        count=count,
        price=price.id,
        rate=render(price.amount),
        amount=render(amount),
    )
