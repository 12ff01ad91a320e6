"""Charge settled generations: compute the target amount, and the ledger entries that lead there from earlier entries.

The sum of a generation's entries always equals the price of its final usage. Entries never change; each one is the
difference that was missing when it was written.
"""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.usage import Usage, nested
from services.billing.core.calls import abandoned_calls, last_call
from services.billing.core.generation import EXPORT, Generation, Pricing
from services.billing.core.money import LARGEST, ZERO, AmountTooLarge, render, times
from services.billing.core.prices import PER_REQUEST, TOKEN_CLASSES, Price, PriceBook, TokenClass

__all__ = ["Basis", "CallBasis", "Charging", "Entry", "Kind", "Line", "Source", "Tokens", "charge", "disjoint"]

Basis = Literal["counted", "reported", "none"]
CallBasis = Literal["provider", "counted", "reported", "none"]
Kind = Literal["charge", "correction", "reversal"]
Source = Literal["counted", "reported", "provider_export", "none"]


class Charging(msgspec.Struct, frozen=True, kw_only=True):
    """The policy for charging generations that did not complete with a report.

    ``partial``: failed, cancelled and interrupted generations. ``missing``: completed ones without a provider report.
    ``abandoned``: calls that did not become the answer; ``provider`` is the report if there is one, else the count.
    ``tenants``: overrides for single tenants, in place of ``partial`` and ``abandoned``.
    """

    partial: Basis = "counted"
    missing: Basis = "counted"
    abandoned: CallBasis = "provider"
    tenants: dict[str, Basis] = {}

    def of(self, tenant: str) -> Basis:
        """Return the policy for a tenant's partial generations."""
        return self.tenants.get(tenant, self.partial)

    def of_calls(self, tenant: str) -> CallBasis:
        """Return the policy for a tenant's abandoned calls."""
        return self.tenants.get(tenant, self.abandoned)


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Billable tokens in disjoint classes: no token is in two of them."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0
    per_request: int = 1

    @property
    def total(self) -> int:
        """Return the sum of all classes."""
        writes = self.cache_write + self.cache_write_1h
        return self.input + self.cached_input + writes + self.output + self.reasoning


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One token class of a bill: its count, its row of the price book, and its amount.

    ``call``: the number of the abandoned call that used the tokens; 0 for the last call.
    """

    token_class: TokenClass
    count: int
    price: int
    rate: str
    amount: str
    call: int = 0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One ledger entry. ``number`` counts a generation's entries from 1.

    ``source``: the source of the numbers; ``rule``: the status and policy that selected them. ``lines``: the bill
    behind ``amount``, as JSON; ``revision``: of the price book. ``created_at`` in milliseconds since 1970.
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
    """The price that a generation's entries must sum to; ``amount`` is ``None`` if nothing is charged."""

    pricing: Pricing
    source: Source
    rule: str
    amount: Decimal | None = None
    currency: str = ""
    lines: tuple[Line, ...] = ()
    tokens: int = 0


def charge(g: Generation, now: int, charging: Charging, book: PriceBook) -> tuple[Generation, list[Entry]]:
    """Return ``g`` with its settled price, and the missing ledger entries. ``g`` has been reconciled at ``now``."""
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


class _Bill(NamedTuple):
    """The tokens of one call, their source, and the model that prices them. ``call``: as in `Line`."""

    call: int
    tokens: Tokens
    source: Source
    provider: str
    model: str


def _target(g: Generation, charging: Charging, book: PriceBook) -> _Target | None:
    """Return the price of ``g`` over all of its calls; ``None`` until its status is decided."""
    if g.status in ("running", "awaiting_provider"):
        return None
    last, rule = _last_bill(g, charging)
    bills = _abandoned_bills(g, charging)
    if bills:
        rule = f"{rule},abandoned:{charging.of_calls(g.tenant)}"
    if last is not None:
        bills.append(last)
    if not bills:
        return _Target("waived", "none", rule)
    return _priced(bills, g.started_at, book, rule)


def _last_bill(g: Generation, charging: Charging) -> tuple[_Bill | None, str]:
    """Return the bill of the last call of ``g``, or None if it is not charged, and the rule applied."""
    basis: Basis = "reported"
    rule = f"{g.status}:reported"
    if g.status in ("partial", "provider_missing"):
        basis = charging.of(g.tenant) if g.status == "partial" else charging.missing
        rule = f"{g.state if g.status == 'partial' else g.status}:{basis}"
    last = last_call(g)
    if basis == "none" or (basis == "reported" and g.usage is None):
        return None, rule
    if g.status == "partial" and g.usage is None and not last.counted_output:
        return None, f"{g.state}:nothing"  # a refusal is free
    source: Source = "counted" if basis == "counted" else "provider_export" if g.usage_source == EXPORT else "reported"
    return _Bill(0, _tokens(last, basis), source, g.provider, g.upstream_model or g.model), rule


def _abandoned_bills(g: Generation, charging: Charging) -> list[_Bill]:
    """Return the bills of abandoned calls; a call without tokens and without a report is free."""
    basis = charging.of_calls(g.tenant)
    bills = []
    for call in abandoned_calls(g) if basis != "none" else ():
        model = call.upstream_model or g.upstream_model or g.model
        if call.usage is not None and basis != "counted":
            source: Source = "provider_export" if call.source == EXPORT else "reported"
            bills.append(_Bill(call.number, disjoint(call.usage), source, call.provider or g.provider, model))
        elif basis != "reported" and (call.usage is not None or call.counted.output):
            counted = Tokens(input=call.counted.input, output=call.counted.output)
            bills.append(_Bill(call.number, counted, "counted", call.provider or g.provider, model))
    return bills


def _tokens(g: Generation, basis: Basis) -> Tokens:
    if basis == "counted" or g.usage is None:
        return Tokens(input=g.counted_input, output=g.counted_output)
    return disjoint(msgspec.json.decode(g.usage, type=Usage))


def disjoint(usage: Usage) -> Tokens:
    """Convert a provider's usage to disjoint classes; its billed units take precedence over its processed ones."""
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


def _priced(bills: Sequence[_Bill], at: int, book: PriceBook, rule: str) -> _Target:
    """Price the bills of all calls and return their sum, with one source and one currency."""
    sources = {bill.source for bill in bills}
    source: Source = bills[-1].source if len(sources) == 1 else "counted" if "counted" in sources else "reported"
    tokens = sum(bill.tokens.total for bill in bills)
    unpriced = _Target("unpriced", source, rule, tokens=tokens)
    lines: list[Line] = []
    currencies: set[str] = set()
    for bill in bills:
        rows = book.rows(bill.provider, bill.model, at)
        base = [rows[c].currency for c in _REQUIRED if c in rows]
        if not base or any(c not in rows and getattr(bill.tokens, c) for c in TOKEN_CLASSES):
            return unpriced
        used = [(c, p) for c, p in rows.items() if getattr(bill.tokens, c)]
        currencies |= {p.currency for _, p in used} or set(base)
        try:
            lines += [_line(c, getattr(bill.tokens, c), p, bill.call) for c, p in used]
        except AmountTooLarge:
            return unpriced
    amount = sum((Decimal(line.amount) for line in lines), ZERO)
    if len(currencies) > 1 or amount >= LARGEST:
        return unpriced
    return _Target("charged", source, rule, amount, currencies.pop(), tuple(lines), tokens)


_REQUIRED: Final[tuple[TokenClass, ...]] = ("input", "output")
"""A model without a price for one of these classes has no price, however few tokens it used."""


def _line(token_class: TokenClass, count: int, price: Price, call: int) -> Line:
    amount = times(count, price.amount, per_million=token_class != PER_REQUEST)
    return Line(
        token_class=token_class,
        count=count,
        price=price.id,
        rate=render(price.amount),
        amount=render(amount),
        call=call,
    )
