"""Budgets: the worst case of a generation, and whether it fits."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.budgets import Reserve
from services.billing.core.budgets import Budget, Need, Standing, Use, admit, beyond, need_of, period_at
from services.billing.core.prices import Price, PriceBook
from services.delivery.requests.budgets import worst_case


def price(token_class: str, amount: str, model: str = "m", currency: str = "USD") -> Price:
    return Price(
        provider="p",
        model=model,
        token_class=token_class,  # type: ignore[arg-type]
        currency=currency,
        amount=Decimal(amount),
        valid_from=0,
    )


def budget(hard: str | None = "10", soft: str | None = None, unit: str = "USD", key: str = "") -> Budget:
    return Budget(
        tenant="t",
        name="b",
        period="day",
        unit=unit,
        hard=None if hard is None else Decimal(hard),
        soft=None if soft is None else Decimal(soft),
        key=key,
    )


def reserve(*models: str, inputs: int = 1_000, outputs: int = 2_000) -> Reserve:
    return Reserve(tenant="t", session="s", generation="g", models=list(models), input=inputs, output=outputs)


def test_the_worst_case_is_the_most_expensive_candidate_and_class() -> None:
    book = PriceBook(
        1,
        [
            price("input", "1"),
            price("cache_write", "4"),
            price("output", "10"),
            price("reasoning", "5"),
            price("per_request", "0.5"),
            price("input", "100", "dear"),
        ],
    )
    need = need_of(reserve("p/m"), book, 0)
    assert need.tokens == 3_000
    assert need.money == {"USD": Decimal("0.004") + Decimal("0.02") + Decimal("0.5")}
    assert need_of(reserve("p/m", "p/dear"), book, 0).money == need.money
    assert need_of(reserve("p/m", "p/dear", inputs=1_000_000), book, 0).money == {"USD": Decimal(100)}
    assert need_of(reserve("p/unknown"), book, 0).money == {}
    hour = PriceBook(2, [*book.prices, price("cache_write_1h", "8")])
    assert need_of(reserve("p/m"), hour, 0).money == {"USD": Decimal("0.008") + Decimal("0.02") + Decimal("0.5")}


def test_a_generation_that_fits_exactly_is_admitted_and_one_token_more_is_not() -> None:
    standing = Standing(budget("100", unit="tokens"), Decimal(60), Decimal(30))
    assert admit([standing], Need(10, {})).refused is None
    assert admit([standing], Need(11, {})).refused == standing


def test_an_exhausted_budget_admits_no_generation_even_a_free_one() -> None:
    assert admit([Standing(budget("5"), Decimal(5), Decimal(0))], Need(10, {})).refused is not None
    assert admit([Standing(budget("0"), Decimal(0), Decimal(0))], Need(10, {})).refused is not None


def test_a_request_beyond_a_soft_limit_is_admitted_and_reported() -> None:
    standing = Standing(budget("10", "5"), Decimal(4), Decimal(0))
    assert admit([standing], Need(1, {"USD": Decimal(1)})) == (None, None)
    assert admit([standing], Need(1, {"USD": Decimal("1.01")})) == (None, standing)


def test_every_budget_must_have_room() -> None:
    wide, narrow = Standing(budget("100"), Decimal(0), Decimal(0)), Standing(budget("1"), Decimal(0), Decimal(0))
    assert admit([wide, narrow], Need(1, {"USD": Decimal(2)})).refused == narrow


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 500))
def test_admitted_reservations_never_exceed_the_hard_limit(needs: list[int], hard: int) -> None:
    reserved = 0
    for need in needs:
        standing = Standing(budget(str(hard), unit="tokens"), Decimal(0), Decimal(reserved))
        if admit([standing], Need(need, {})).refused is None:
            reserved += need
    assert reserved <= hard


def use(name: str, used: int, reserved: int) -> Use:
    return Use(("t", "s", name), "", Decimal(used), Decimal(reserved))


def test_a_generation_within_its_reservation_is_not_stopped() -> None:
    standing = Standing(budget("100", unit="tokens"), Decimal(20), Decimal(80))
    assert beyond(standing, [use("a", 40, 40), use("b", 39, 40)]) == []
    assert beyond(Standing(budget(None, "1", unit="tokens"), Decimal(20), Decimal(80)), [use("a", 90, 40)]) == []


def test_a_generation_beyond_its_reservation_is_stopped_when_the_rest_is_reserved() -> None:
    standing = Standing(budget("100", unit="tokens"), Decimal(20), Decimal(79))
    assert beyond(standing, [use("a", 40, 39), use("b", 10, 40)]) == []
    assert beyond(standing, [use("a", 41, 39), use("b", 10, 40)]) == [("t", "s", "a")]


def test_an_exhausted_budget_stops_every_generation_it_covers() -> None:
    uses = [use("a", 10, 40), use("b", 30, 40), Use(("t", "s", "c"), "k", Decimal(9), Decimal(10))]
    assert beyond(Standing(budget("40", unit="tokens"), Decimal(0), Decimal(90)), uses) == [
        u.generation_key for u in uses
    ]
    assert beyond(Standing(budget("9", unit="tokens", key="k"), Decimal(0), Decimal(10)), uses) == [
        uses[2].generation_key
    ]


@pytest.mark.parametrize(
    ("period", "at", "first", "after"),
    [
        ("day", "2026-02-28T23:59:59", "2026-02-28", "2026-03-01"),
        ("month", "2024-02-29T12:00:00", "2024-02-01", "2024-03-01"),
        ("month", "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
        ("month", "2026-01-31T00:00:00", "2026-01-01", "2026-02-01"),
    ],
)
def test_periods_follow_the_calendar_in_utc(period: str, at: str, first: str, after: str) -> None:
    def ms(text: str) -> int:
        return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1_000)

    assert period_at(period, ms(at)) == (ms(first), ms(after))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limits", [{"hard": None}, {"hard": "-1"}, {"hard": "NaN"}, {"hard": "1", "soft": "2"}, {"hard": "Infinity"}]
)
def test_invalid_limits_are_refused(limits: dict[str, str | None]) -> None:
    with pytest.raises(ValueError, match="limit"):
        budget(**limits)


def test_a_budget_of_a_credential_covers_only_that_one() -> None:
    assert budget(key="k1").covers("k1")
    assert not budget(key="k1").covers("k2")
    assert budget().covers("k2")


def test_a_request_without_max_tokens_reserves_the_default() -> None:
    messages = [{"role": "user", "content": "x" * 300}]
    inputs, outputs = worst_case(messages, {}, 4_096)
    assert inputs >= 100
    assert outputs == 4_096
    assert worst_case(messages, {"max_tokens": 50, "n": 3}, 4_096)[1] == 150
    assert worst_case(messages, {"max_completion_tokens": 70, "max_tokens": 50}, 4_096)[1] == 70
    assert worst_case(messages, {"max_tokens": True, "n": "4"}, 9)[1] == 9
    assert worst_case(messages, {"max_tokens": 10**30, "n": 10**30}, 9)[1] == 10**9
    assert worst_case(messages, {"tools": [{"x": "y" * 600}]}, 9)[0] > inputs
