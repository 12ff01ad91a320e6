"""Test that every call of a generation is counted, compared and charged separately and that it costs their sum."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import AbandonedCall, Completed, Delta, Event, Failed, Interrupted, Notice, Restarted, UsageReported
from schemas.usage import Counted, Usage
from services.billing.core import calls as module
from services.billing.core.calls import abandoned_calls, last_call
from services.billing.core.charging import Charging, Entry, Line
from services.billing.core.fold import fold, take_export
from services.billing.core.generation import Generation
from services.billing.core.prices import PriceBook
from services.billing.core.settlement import Terms, settle
from services.billing.views import trail
from tests.support.billing_histories import START, address, history, records
from tests.support.billing_prices import price

NOW = round((START + 10_000) * 1_000)
BOOK = PriceBook(1, [price("input", "2", id=1), price("output", "10", id=2)])
TERMS = Terms(book=BOOK)
COUNTED = Counted(input=7, output=20, exact=True, encoding="o200k_base")


def call(number: int, **changes: Any) -> AbandonedCall:
    made = AbandonedCall(
        number=number, code="upstream_cut_off", provider="openai", upstream_model="gpt", counted=COUNTED
    )
    return msgspec.structs.replace(made, **changes)


def logged(*events: Event) -> list[Event]:
    """Number events, and give each the epoch of the last restart before it."""
    epoch = 1
    for seq, event in enumerate(events):
        epoch += isinstance(event, Restarted)
        event.seq, event.epoch, event.at = seq, epoch, START
    return list(events)


def begun() -> list[Event]:
    return history(deltas=0, terminal=None)


def said(tokens: int = 20) -> Event:
    return Delta(generation="g", seq=0, text="x", tokens=tokens)


def restarted(left: AbandonedCall | None = None) -> Event:
    return Restarted(
        generation="g", seq=0, reason="upstream_failed", provider="openai", upstream_model="gpt", call=left
    )


def retried(left: AbandonedCall, provider: str = "openai") -> Event:
    return Notice(generation="g", seq=0, code="retrying", provider=provider, upstream_model="gpt", call=left)


def failed(output: int = 20) -> Event:
    counted = Counted(input=7, output=output, exact=True, encoding="o200k_base")
    return Failed(generation="g", seq=0, code="upstream_cut_off", counted=counted)


def completed(output: int = 20) -> Event:
    counted = Counted(input=7, output=output, exact=True, encoding="o200k_base")
    return Completed(generation="g", seq=0, finish_reason="stop", counted=counted)


def reported(usage: Usage, number: int = 0, source: str = "stream") -> Event:
    return UsageReported(generation="g", seq=0, usage=usage, source=source, call=number)


def folded(*events: Event) -> Generation:
    g = fold(None, address(), records(logged(*events))).generation
    assert g is not None
    return g


def charged(*events: Event, terms: Terms = TERMS) -> tuple[Generation, list[Entry]]:
    return settle(folded(*events), NOW, terms)


def lines(entry: Entry) -> list[tuple[int, str, int]]:
    return [(line.call, line.token_class, line.count) for line in msgspec.json.decode(entry.lines, type=list[Line])]


def test_three_calls_that_each_broke_off_after_20_tokens_are_settled_with_60() -> None:
    g, [entry] = charged(*begun(), said(), restarted(call(1)), said(), restarted(call(2)), said(), failed())
    assert (g.counted_input, g.counted_output, g.tokens) == (3 * 7, 60, 3 * 7 + 60)
    assert entry.amount == Decimal(3 * 7 * 2 + 60 * 10) / 1_000_000
    assert (entry.rule, entry.source) == ("failed:counted,abandoned:provider", "counted")
    assert lines(entry) == [(n, name, count) for n in (1, 2, 0) for name, count in (("input", 7), ("output", 20))]
    assert [c.number for c in abandoned_calls(g)] == [1, 2]


def test_a_budget_counts_earlier_calls_while_the_generation_runs() -> None:
    g = folded(*begun(), said(), restarted(call(1)), said(5))
    assert (g.state, g.counted_output) == ("running", 25)
    more = fold(g, address(), records([Delta(generation="g", seq=4, epoch=2, text="x", tokens=6)], 100)).generation
    assert more is not None
    assert more.counted_output == 26


def test_the_status_compares_the_last_call_alone() -> None:
    g, _ = charged(*begun(), said(), restarted(call(1)), said(30), reported(Usage(input=7, output=30)), completed(30))
    assert (g.status, g.drift_input, g.drift_output) == ("matched", 0, 0)
    assert (g.counted_output, g.output, g.input) == (50, 30, 7)
    shown = trail(g, [])
    assert (shown.counted.output, shown.reported and shown.reported.output) == (30, 30)
    [left] = shown.abandoned_calls
    assert (left.number, left.code, left.counted.output, left.reported, left.drift) == (
        1,
        "upstream_cut_off",
        20,
        None,
        None,
    )
    assert left.estimated
    assert shown.charge.tokens == 7 + 20 + 7 + 30


def test_usage_of_a_call_without_tokens_is_paid_and_compared_by_itself() -> None:
    silent = call(1, counted=Counted(input=7), usage=Usage(input=9, output=2), source="stream")
    g, [entry] = charged(*begun(), retried(silent), said(30), reported(Usage(input=7, output=30)), completed(30))
    assert (g.input, g.output, g.counted_output) == (16, 32, 30)
    assert g.tokens == 9 + 2 + 7 + 30
    assert entry.source == "reported"
    [left] = trail(g, []).abandoned_calls
    assert (left.drift and left.drift.input, left.drift and left.drift.output) == (2, 2)
    assert not left.estimated


def test_a_call_without_output_and_usage_is_free() -> None:
    silent = call(1, counted=Counted(input=7))
    g, [entry] = charged(*begun(), retried(silent), said(30), reported(Usage(input=7, output=30)), completed(30))
    assert g.tokens == 37
    assert (entry.rule, len(abandoned_calls(g))) == ("matched:reported", 1)


def test_a_generation_without_a_last_call_pays_for_the_call_before() -> None:
    left = call(1, usage=Usage(input=7, output=20), source="stream")
    g, [entry] = charged(*begun(), retried(left), failed(0))
    assert (g.tokens, entry.rule) == (27, "failed:nothing,abandoned:provider")
    nothing, entries = charged(*begun(), failed(0))
    assert (nothing.pricing, entries) == ("waived", [])


REPORT = Usage(input=9, output=25)


@pytest.mark.parametrize(
    ("basis", "usage", "tokens"),
    [
        ("provider", None, 27),
        ("provider", REPORT, 34),
        ("counted", None, 27),
        ("counted", REPORT, 27),
        ("reported", None, 0),
        ("reported", REPORT, 34),
        ("none", None, 0),
        ("none", REPORT, 0),
    ],
)
def test_the_policy_selects_counted_or_reported_usage_for_an_abandoned_call(
    basis: Any, usage: Usage | None, tokens: int
) -> None:
    left = call(1, usage=usage, source="stream" if usage else "")
    events = (*begun(), said(), restarted(left), said(30), reported(Usage(input=7, output=30)), completed(30))
    g, _ = charged(*events, terms=Terms(book=BOOK, charging=Charging(abandoned=basis)))
    assert g.tokens == 37 + tokens
    own = Charging(abandoned="provider", tenants={"default": "none"})
    assert charged(*events, terms=Terms(book=BOOK, charging=own))[0].tokens == 37


@pytest.mark.parametrize("told", [True, False])
def test_a_call_of_a_lost_producer_is_counted_up_to_its_last_logged_token(told: bool) -> None:
    lost = call(1, code="producer_lost", counted=Counted(input=7, output=20, encoding="o200k_base"))
    g, [entry] = charged(*begun(), said(), restarted(lost if told else None), said(30), completed(30))
    assert [(c.number, c.code, c.counted, c.provider) for c in abandoned_calls(g)] == [
        (1, "producer_lost", lost.counted, "openai")
    ]
    assert g.tokens == 27 + 37
    assert entry.rule == "provider_missing:counted,abandoned:provider"
    assert trail(g, []).abandoned_calls[0].counted.exact is False


def test_another_producer_that_closes_the_generation_adds_no_call() -> None:
    end = Interrupted(generation="g", seq=0, reason="producer_lost", counted=Counted(input=7, output=20))
    events = logged(*begun(), said(), end)
    events[-1].epoch = 2
    g = fold(None, address(), records(events)).generation
    assert g is not None
    assert (g.calls, settle(g, NOW, TERMS)[0].tokens) == ("", 27)


def test_usage_before_a_missing_terminal_belongs_to_the_call_that_was_lost() -> None:
    g, _ = charged(*begun(), said(), reported(Usage(input=8, output=21)), restarted(), said(30), completed(30))
    [lost] = abandoned_calls(g)
    assert (lost.usage, lost.source) == (Usage(input=8, output=21), "stream")
    assert (g.usage, g.status, g.tokens) == (None, "provider_missing", 29 + 37)


def test_late_usage_of_an_abandoned_call_corrects_that_call_alone() -> None:
    events = (*begun(), said(), restarted(call(1, upstream_id="id-1")), said(30), reported(Usage(input=7, output=30)))
    before, [entry] = charged(*events, completed(30))
    late = reported(Usage(input=8, output=26), 1, "lookup")
    late.seq, late.epoch = before.next_seq, 2
    told = fold(before, address(), records([late], 100)).generation
    assert told is not None
    after, [correction] = settle(told, NOW, TERMS)
    assert (after.status, after.usage, after.tokens) == (before.status, before.usage, before.tokens + 7)
    assert (entry.kind, correction.kind, correction.amount) == ("charge", "correction", Decimal("0.000062"))
    assert abandoned_calls(after)[0].source == "lookup"


def test_an_export_of_an_abandoned_call_overrides_the_log_in_either_order() -> None:
    events = (*begun(), said(), restarted(call(1)), said(30), reported(Usage(input=7, output=30)), completed(30))
    g = folded(*events)
    take_export(g, 1, Usage(input=8, output=40))
    late = reported(Usage(input=8, output=26), 1, "lookup")
    late.seq, late.epoch = g.next_seq, 2
    g = fold(g, address(), records([late], 100)).generation or g
    after, [entry] = settle(g, NOW, TERMS)
    assert (after.tokens, after.output, entry.source) == (48 + 37, 70, "reported")
    assert abandoned_calls(after)[0].source == "provider_export"


def test_a_call_is_priced_by_the_provider_that_answered_it() -> None:
    dear = [price("input", "2", id=3, provider="dear"), price("output", "20", id=4, provider="dear")]
    left = call(1, provider="dear")
    events = (*begun(), said(), restarted(left), said(30), reported(Usage(input=7, output=30)), completed(30))
    g, [entry] = charged(*events, terms=Terms(book=PriceBook(1, [*BOOK.prices, *dear])))
    assert entry.amount == Decimal(7 * 2 + 20 * 20 + 7 * 2 + 30 * 10) / 1_000_000
    euro = [msgspec.structs.replace(row, currency="EUR") for row in dear]
    for book in (PriceBook(1, [*BOOK.prices, *euro]), BOOK):
        left = call(1, provider="dear" if book is not BOOK else "unknown")
        events = (*begun(), said(), restarted(left), said(30), reported(Usage(input=7, output=30)), completed(30))
        g, entries = charged(*events, terms=Terms(book=book))
        assert (g.pricing, entries, g.tokens) == ("unpriced", [], 64)


def test_a_failover_without_usage_is_priced_by_the_answering_provider() -> None:
    notice = Notice(generation="g", seq=0, code="failover", provider="other", upstream_model="m2")
    g = folded(*begun(), notice, said(30), completed(30))
    assert (g.provider, g.upstream_model) == ("other", "m2")


def test_calls_beyond_the_limit_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 3)
    events = [*begun(), said()]
    for number in range(1, 9):
        events += [restarted(call(number)), said()]
    g, _ = charged(*events, failed())
    assert len(abandoned_calls(g)) == 3
    assert (g.counted_output, g.tokens) == (9 * 20, 9 * 27)


_outcomes = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.none() | st.builds(Usage, input=st.integers(0, 50), output=st.integers(0, 50)),
        st.booleans(),
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(
    _outcomes,
    st.integers(1, 40),
    st.none() | st.builds(Usage, input=st.integers(0, 50), output=st.integers(1, 50)),
    st.data(),
)
def test_a_generation_costs_the_sum_of_its_calls_under_any_batching(
    left: list[tuple[int, Usage | None, bool]], output: int, usage: Usage | None, data: st.DataObject
) -> None:
    events = begun()
    tokens = 0
    for number, (count, told, is_told) in enumerate(left, 1):
        one = call(number, counted=Counted(input=7, output=count), usage=told, source="stream" if told else "")
        if count:
            events += [said(count), restarted(one if told or is_told else None)]
        else:
            events.append(retried(one))
        tokens += told.input + told.output if told else 7 + count if count else 0
    events.append(said(output))
    events += [reported(usage)] if usage else []
    events.append(completed(output))
    tokens += usage.input + usage.output if usage else 7 + output
    log = records(logged(*events))
    g: Generation | None = None
    ledger: list[Entry] = []
    at = 0
    while at < len(log):
        size = data.draw(st.integers(1, len(log) - at))
        again = data.draw(st.integers(0, at))
        g = fold(g, address(), log[again : at + size]).generation
        assert g is not None
        g, entries = settle(g, NOW, TERMS)
        ledger += entries
        at += size
    assert g is not None
    assert g.tokens == tokens
    assert sum((entry.amount for entry in ledger), Decimal(0)) == g.amount
    whole = fold(None, address(), log).generation
    assert whole is not None
    one, other = settle(whole, NOW, TERMS)[0], g
    same = ("calls", "counted_input", "counted_output", "input", "output", "usage", "tokens", "amount", "status")
    assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
    assert last_call(g).counted_output == output
