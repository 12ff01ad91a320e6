"""Test the cost of generations and their ledger entries."""

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import Cancelled, Completed, Delta, Failed, Interrupted, Started, UsageReported
from schemas.usage import Usage
from services.billing.core.charging import Charging, Entry, Tokens, disjoint
from services.billing.core.drift import REASONS
from services.billing.core.fold import fold, take_usage
from services.billing.core.generation import EXPORT, PRICINGS, STATUSES, Generation
from services.billing.core.money import ZERO
from services.billing.core.prices import PriceBook
from services.billing.core.reconciliation import Policy, Tolerance
from services.billing.core.settlement import Terms, settle
from tests.support.billing_histories import START, address, history, records
from tests.support.billing_prices import book, price

SOON = round((START + 10) * 1_000)
LATER = round((START + 10_000) * 1_000)
TERMS = Terms(book=book())


def folded(events) -> Generation:  # type: ignore[no-untyped-def]
    g = fold(None, address(), records(events)).generation
    assert g is not None
    return g


def settled(terms: Terms = TERMS, now: int = SOON, **made) -> tuple[Generation, list[Entry]]:  # type: ignore[no-untyped-def]
    return settle(folded(history(**made)), now, terms)


def amounts(entries: list[Entry]) -> list[tuple[str, str]]:
    return [(e.kind, f"{e.amount.normalize():f}") for e in entries]


def test_a_completed_generation_is_charged_by_its_report() -> None:
    g, [entry] = settled(reported=Usage(input=8, output=31))
    assert (g.status, g.pricing, g.amount, g.currency, g.entries) == ("matched", "charged", entry.amount, "USD", 1)
    assert (entry.kind, entry.number, entry.source, entry.rule) == ("charge", 1, "reported", "matched:reported")
    assert entry.amount == Decimal("0.00033")
    assert msgspec.json.decode(entry.lines) == [
        {"token_class": "input", "count": 8, "price": 1, "rate": "2.5", "amount": "0.00002"},
        {"token_class": "output", "count": 31, "price": 2, "rate": "10", "amount": "0.00031"},
    ]


def test_settling_again_gives_no_entry() -> None:
    g, _ = settled(reported=Usage(input=8, output=31))
    assert settle(g, LATER, TERMS) == (g, [])


def test_nothing_is_charged_before_the_end_or_while_the_provider_has_its_grace() -> None:
    for terminal in (None, Completed):
        g, entries = settled(terminal=terminal)
        assert (g.pricing, entries) == ("pending", [])


@pytest.mark.parametrize(
    ("basis", "pricing", "amount"),
    [("counted", "charged", "0.0003175"), ("reported", "waived", "0"), ("none", "waived", "0")],
)
def test_a_provider_that_never_reports_is_settled_by_policy(basis: str, pricing: str, amount: str) -> None:
    g, entries = settled(Terms(book=book(), charging=Charging(missing=basis)), LATER)  # type: ignore[arg-type]
    assert (g.status, g.pricing, g.amount) == ("provider_missing", pricing, Decimal(amount))
    assert [e.rule for e in entries] == ([f"provider_missing:{basis}"] if entries else [])


@pytest.mark.parametrize("terminal", [Failed, Cancelled, Interrupted])
@pytest.mark.parametrize(
    ("basis", "amount", "source"),
    [("counted", "0.0003175", "counted"), ("reported", "0.0002", "reported"), ("none", "0", None)],
)
def test_partial_generations_are_charged_by_their_tenants_policy(terminal, basis, amount, source) -> None:  # type: ignore[no-untyped-def]
    charging = Charging(partial="none" if basis != "none" else "counted", tenants={"default": basis})
    g, entries = settled(Terms(book=book(), charging=charging), reported=Usage(input=0, output=20), terminal=terminal)
    assert (g.status, g.amount) == ("partial", Decimal(amount))
    assert [e.source for e in entries] == ([source] if source else [])


def test_a_refusal_costs_nothing() -> None:
    g, entries = settled(deltas=0, terminal=Failed)
    assert (g.status, g.pricing, entries) == ("partial", "waived", [])


def test_a_generation_without_a_price_is_charged_once_a_price_exists() -> None:
    g, entries = settled(Terms(), reported=Usage(input=7, output=30))
    assert (g.pricing, entries) == ("unpriced", [])
    g, entries = settle(g, LATER, TERMS)
    assert (g.pricing, amounts(entries)) == ("charged", [("charge", "0.0003175")])


def test_a_class_of_tokens_without_a_price_leaves_all_unpriced() -> None:
    g, _ = settled(Terms(book=book(output="10")), reported=Usage(input=7, output=30))
    assert g.pricing == "unpriced"
    g, _ = settled(Terms(book=book(output="10")), reported=Usage(input=0, output=30))
    assert g.pricing == "charged"


def test_a_generation_priced_in_two_currencies_is_unpriced() -> None:
    mixed = PriceBook(1, [price("input", "1"), price("output", "1", currency="EUR")])
    g, _ = settled(Terms(book=mixed), reported=Usage(input=7, output=30))
    assert g.pricing == "unpriced"


def test_new_prices_correct_and_a_withdrawn_one_reverses() -> None:
    g, _ = settled(reported=Usage(input=0, output=30))
    g, entries = settle(g, LATER, Terms(book=book(2, input="1", output="12")))
    assert amounts(entries) == [("correction", "0.00006")]
    g, entries = settle(g, LATER, Terms(book=PriceBook(3)))
    assert (g.pricing, g.amount, amounts(entries)) == ("unpriced", ZERO, [("reversal", "-0.00036")])
    assert settle(g, LATER, Terms(book=PriceBook(4))) == (g, [])
    g, entries = settle(g, LATER, TERMS)
    assert amounts(entries) == [("charge", "0.0003")]
    euros = PriceBook(5, [price("input", "1", currency="EUR"), price("output", "10", currency="EUR")])
    g, entries = settle(g, LATER, Terms(book=euros))
    assert [(e.kind, e.currency, e.number) for e in entries] == [("reversal", "USD", 5), ("charge", "EUR", 6)]
    assert (g.currency, g.entries) == ("EUR", 6)


def test_a_price_per_request_is_added_once() -> None:
    g, _ = settled(Terms(book=book(input="0", output="0", per_request="0.01")), reported=Usage(input=7, output=30))
    assert g.amount == Decimal("0.01")


def test_an_amount_beyond_the_maximum_is_unpriced() -> None:
    g, _ = settled(Terms(book=book(input="1", output="8999999")), reported=Usage(input=7, output=2**53 - 1))
    assert g.pricing == "unpriced"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (Usage(input=100, cached_input=30, cache_write=20, output=50, reasoning=10), (50, 30, 20, 0, 40, 10)),
        (Usage(input=100, cached_input=30, cache_write=20, cache_write_1h=15, output=50), (50, 30, 5, 15, 50, 0)),
        (Usage(input=100, output=50, billed_input=80, billed_output=45, cached_input=90), (0, 80, 0, 0, 45, 0)),
        (Usage(input=1, cached_input=5, cache_write=5, output=1, reasoning=9), (0, 5, 5, 0, 0, 9)),
        (Usage(input=1, cache_write_1h=5, output=1), (0, 0, 0, 5, 1, 0)),
    ],
)
def test_classes_are_made_disjoint_and_billed_units_are_used(usage: Usage, tokens: tuple[int, ...]) -> None:
    names = ("input", "cached_input", "cache_write", "cache_write_1h", "output", "reasoning")
    assert disjoint(usage) == Tokens(**dict(zip(names, tokens, strict=True)))


def test_an_export_overrides_logged_usage_in_either_order() -> None:
    events = history(reported=Usage(input=7, output=30))
    late = UsageReported(generation="g", seq=len(events), usage=Usage(input=7, output=60), source="lookup")
    before, after = folded([*events, late]), folded(events)
    take_usage(before, Usage(input=7, output=40), EXPORT)
    take_usage(after, Usage(input=7, output=40), EXPORT)
    again = fold(after, address(), records([late], 100)).generation
    assert again is not None
    (one, [entry]), (two, _) = settle(before, LATER, TERMS), settle(again, LATER, TERMS)
    assert (one.output, two.output, one.amount, entry.source) == (40, 40, two.amount, "provider_export")


@pytest.mark.parametrize(
    ("made", "changes", "reasons"),
    [
        ({"reported": Usage(input=7, output=930, reasoning=900)}, {}, "hidden_reasoning"),
        ({"reported": Usage(input=507, output=30, cached_input=500)}, {}, "cached_tokens"),
        ({"reported": Usage(input=7, output=90)}, {"code": "tool_calls"}, "tool_calls"),
        ({"reported": Usage(input=7, output=90)}, {"counted_exact": False}, "estimate"),
        ({"reported": Usage(input=7, output=90, billed_output=80)}, {}, "billed_units"),
        ({"reported": Usage(input=7, output=90)}, {"epoch": 2, "headless": True}, "attempts,headless"),
        ({"terminal": Failed}, {"code": "upstream_cut_off"}, "cut_off"),
        ({"terminal": Interrupted}, {}, "cut_off"),
        ({"reported": Usage(input=7, output=30)}, {"counted_exact": False}, ""),
    ],
)
def test_settlement_adds_the_reasons_for_doubt(made, changes, reasons) -> None:  # type: ignore[no-untyped-def]
    g = msgspec.structs.replace(folded(history(**made)), **changes)
    assert settle(g, LATER, TERMS)[0].reasons == reasons


def test_a_matched_generation_keeps_the_reasons_of_its_report() -> None:
    g, _ = settled(reported=Usage(input=7, output=30, reasons=("usage_unreadable", "something_new")))
    assert (g.status, g.reasons) == ("matched", "usage_unreadable")
    g, _ = settled(reported=Usage(input=7, output=90, billed_output=80, reasons=("usage_total", "usage_unreadable")))
    assert g.reasons == "billed_units,usage_unreadable,usage_total"


def test_classes_larger_than_their_total_are_charged_in_full_with_a_reason() -> None:
    g, [entry] = settled(reported=Usage(input=7, output=30, reasoning=40, cached_input=3, cache_write=9))
    assert (g.input, g.output, g.cached_input, g.cache_write) == (12, 40, 3, 9)
    assert "usage_inconsistent" in g.reasons
    assert entry.amount == (12 * Decimal("2.50") + 40 * 10) / 1_000_000


def test_all_reasons_together_fit_their_column() -> None:
    assert len(",".join(REASONS)) <= 200


def test_cache_writes_of_an_hour_have_a_price_of_their_own() -> None:
    usage = Usage(input=1_000, output=0, cached_input=100, cache_write=500, cache_write_1h=200)
    prices = {"input": "4", "output": "20", "cached_input": "0.4", "cache_write": "5", "cache_write_1h": "8"}
    g, [entry] = settled(Terms(book=book(**prices)), reported=usage)
    counts = {line["token_class"]: line["count"] for line in msgspec.json.decode(entry.lines)}
    assert counts == {"input": 400, "cached_input": 100, "cache_write": 300, "cache_write_1h": 200}
    assert g.amount == (400 * 4 + 100 * Decimal("0.4") + 300 * 5 + 200 * 8) / Decimal(1_000_000)
    assert (g.cache_write_1h, g.tokens) == (200, 1_000)
    del prices["cache_write_1h"]
    assert settled(Terms(book=book(**prices)), reported=usage)[0].amount == g.amount - Decimal("0.0006")


def test_a_reason_is_gone_when_the_numbers_match_again() -> None:
    g, _ = settled(reported=Usage(input=7, output=90, billed_output=1))
    assert g.reasons == "billed_units"
    take_usage(g, Usage(input=7, output=30), EXPORT)
    assert settle(g, LATER, TERMS)[0].reasons == ""


def test_a_model_may_have_a_tolerance_of_its_own() -> None:
    policy = Policy(models=(Tolerance(model="openai/gp?", absolute=100), Tolerance(model="*", absolute=0)))
    assert settled(Terms(policy=policy), reported=Usage(input=7, output=90))[0].status == "matched"
    other = Policy(models=(Tolerance(model="anthropic/*", absolute=100),))
    assert settled(Terms(policy=other), reported=Usage(input=7, output=90))[0].status == "drift"


usages = st.builds(
    Usage,
    input=st.integers(0, 100),
    output=st.integers(0, 100),
    cached_input=st.integers(0, 60),
    cache_write=st.integers(0, 60),
    cache_write_1h=st.integers(0, 60),
    reasoning=st.integers(0, 100),
    billed_output=st.none() | st.integers(0, 100),
)
rates = st.decimals("0", "100", places=6).map(str)
books = st.dictionaries(st.sampled_from(["input", "output", "cached_input", "reasoning", "per_request"]), rates).map(
    lambda amounts: PriceBook(1, [price(n, a, id=1, currency="USD") for n, a in amounts.items()])  # type: ignore[arg-type]
)
chargings = st.builds(
    Charging,
    partial=st.sampled_from(["counted", "reported", "none"]),
    missing=st.sampled_from(["counted", "reported", "none"]),
)


@settings(max_examples=300)
@given(
    st.sampled_from([Completed, Failed, Cancelled, Interrupted]),
    st.none() | usages,
    st.lists(st.one_of(usages, st.tuples(usages), books, chargings, st.just(LATER)), max_size=8),
)
def test_the_sum_of_the_entries_is_always_the_price_of_the_final_usage(terminal, first, changes) -> None:  # type: ignore[no-untyped-def]
    """Late usage, exports, new prices, new policies and the end of the grace, in any order."""
    events = history(reported=first, terminal=terminal)
    g, now, terms, ledger = folded(events), SOON, TERMS, []
    for at, change in enumerate([None, *changes]):
        match change:
            case Usage():
                late = UsageReported(generation="g", seq=g.next_seq, at=START, usage=change)
                after = fold(g, address(), records([late], 100 + at)).generation
                assert after is not None
                g = after
            case (export,):
                g = msgspec.structs.replace(g)
                take_usage(g, export, EXPORT)
            case PriceBook():
                terms = Terms(book=change, charging=terms.charging)
            case Charging():
                terms = Terms(book=terms.book, charging=change)
            case int():
                now = change
        g, entries = settle(g, now, terms)
        ledger += entries
        assert settle(g, now, terms) == (g, [])
    assert [e.number for e in ledger] == list(range(1, len(ledger) + 1))
    assert g.entries == len(ledger)
    sums = {e.currency: sum((x.amount for x in ledger if x.currency == e.currency), ZERO) for e in ledger}
    assert sums.get(g.currency, ZERO) == g.amount
    bare = msgspec.structs.replace(g, entries=0, amount=ZERO, currency="", pricing="pending")
    fresh, _ = settle(bare, now, terms)
    assert (fresh.amount, fresh.status) == (g.amount, g.status)
    if fresh.status != "awaiting_provider":
        assert fresh.pricing == g.pricing
    assert g.status in STATUSES
    assert g.pricing in PRICINGS


def test_labels_are_stored_unless_they_are_too_large() -> None:
    started = Started(
        generation="g", seq=0, model="m", provider="p", upstream_model="m", metadata={"b": "2", "a": "\0"}
    )
    assert folded([started]).metadata == '{"a":"","b":"2"}'
    many = Started(
        generation="g",
        seq=0,
        model="m",
        provider="p",
        upstream_model="m",
        metadata={str(n): "x" * 200 for n in range(50)},
    )
    assert folded([many]).metadata == ""
    assert folded([Delta(generation="g", seq=0, tokens=1, text="x")]).metadata == ""
