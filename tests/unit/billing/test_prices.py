"""The price book and price files."""

import re
from contextlib import suppress
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.core.money import LARGEST, AmountTooLarge, parse_price, render, times
from services.billing.core.price_file import BadPrices, parse_csv, parse_json, parse_toml, render_rows
from services.billing.core.prices import CLASSES, Price, PriceBook
from services.billing.price_loading import SHIPPED_FILE, read_price_file
from tests.support.billing_prices import BOOK_TOML, SINCE, price

DAY = 86_400_000


def chosen(*prices: Price, provider: str = "openai", model: str = "gpt-4o", at: int = SINCE) -> str | None:
    found = PriceBook(1, prices).price(provider, model, "input", at)
    return None if found is None else str(found.amount)


@given(st.integers(0, 2**53), st.decimals("0", "8999999.999999", places=6))
def test_an_amount_is_exact_or_refused(count: int, rate: Decimal) -> None:
    exact = count * int(rate * 10**6)  # in 10⁻¹²
    if exact >= int(LARGEST) * 10**12:
        with pytest.raises(AmountTooLarge):
            times(count, rate)
    else:
        assert times(count, rate).scaleb(12) == exact


@pytest.mark.parametrize("text", ["", "-1", "1e3", "NaN", "0.0000001", "9000000", "1,5", "\u0663"])
def test_an_invalid_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_price(text)


def test_amounts_are_written_without_needless_zeros() -> None:
    assert [render(Decimal(t)) for t in ("1.500000", "0.000000000001", "-3.0", "10", "0E-12")] == [
        "1.5",
        "0.000000000001",
        "-3",
        "10",
        "0",
    ]


def test_the_price_valid_at_the_start_applies() -> None:
    old, new = price(amount="3", valid_until=SINCE + 2 * DAY), price(amount="2", valid_from=SINCE + DAY)
    assert chosen(old, new, at=SINCE - 1) is None
    assert chosen(old, new, at=SINCE) == "3"
    assert chosen(old, new, at=SINCE + DAY) == "2"
    assert chosen(old, at=SINCE + 2 * DAY - 1) == "3"
    assert chosen(old, at=SINCE + 2 * DAY) is None


def test_the_most_specific_row_wins() -> None:
    ladder = [
        price(provider="*", model="*", amount="1"),
        price(provider="*", model="gpt*", amount="2"),
        price(provider="*", model="gpt-4o", amount="3"),
        price(provider="openai", model="*", amount="4"),
        price(provider="openai", model="gpt-*", amount="5"),
        price(provider="openai", model="gpt-4o*", amount="6"),
        price(provider="openai", model="gpt-4o", amount="7"),
    ]
    for top in range(len(ladder), 0, -1):
        assert chosen(*ladder[:top]) == str(top)
    assert chosen(*ladder, model="gpt-5") == "5"
    assert chosen(*ladder, provider="other", model="llama") == "1"


def test_one_hour_cache_writes_fall_back_to_cache_writes_and_these_to_input() -> None:
    def hour(*prices: Price) -> str:
        found = PriceBook(1, prices).price("openai", "gpt-4o", "cache_write_1h", SINCE)
        assert found is not None
        return str(found.amount)

    all_three = [price("input", "1"), price("cache_write", "2"), price("cache_write_1h", "3")]
    assert [hour(*all_three[:n]) for n in (1, 2, 3)] == ["1", "2", "3"]
    assert hour(*all_three, price("input", "9", model="gpt-4o")) == "9"


def test_a_table_may_name_several_models() -> None:
    text = BOOK_TOML.replace('"gpt*"', '["gpt-4o", "gpt-4o-20*"]')
    rows = parse_toml(text)
    assert [(r.model, r.token_class) for r in rows] == [
        (model, name) for model in ("gpt-4o", "gpt-4o-20*") for name in ("input", "cached_input", "output")
    ]
    for models, fault in (("[]", "empty"), ('["a", 3]', "model"), ('["a", "a"]', "same provider")):
        with pytest.raises(BadPrices, match=fault):
            parse_toml(BOOK_TOML.replace('"gpt*"', models))


SHIPPED = PriceBook(1, read_price_file(SHIPPED_FILE)[0])
NOVEMBER = 1_796_000_000_000


def shipped(provider: str, model: str) -> dict[str, Decimal]:
    return {name: row.amount for name, row in SHIPPED.rows(provider, model, NOVEMBER).items()}


def test_shipped_prices_name_their_sources_and_date_and_do_not_contradict_each_other() -> None:
    text = SHIPPED_FILE.read_text()
    assert "November 2026" in text
    tables = text.count("[[price]]")
    assert 40 <= tables <= 80
    for provider, url in (("openai", "openai.com"), ("anthropic", "anthropic.com"), ("cohere", "cohere.com")):
        assert any(row.provider == provider for row in SHIPPED.prices)
        assert re.search(rf"^# .*https://\S*{url}", text, re.MULTILINE)
    models = [(row.provider, row.model) for row in SHIPPED.prices if "*" not in row.model and "?" not in row.model]
    for provider, model in models:
        prices = shipped(provider, model)
        assert prices["cached_input"] <= prices["input"] <= prices["output"], model
        if provider == "anthropic":
            assert prices["cache_write"] == prices["input"] * Decimal("1.25"), model
            assert prices["cache_write_1h"] == prices["input"] * 2, model
        elif provider == "openai":
            assert prices["cache_write"] in (prices["input"], prices["input"] * Decimal("1.25")), model


@pytest.mark.parametrize(
    ("provider", "model", "output"),
    [
        ("openai", "gpt-4o-2024-08-06", "10"),
        ("openai", "gpt-4o-2024-05-13", "15"),
        ("openai", "gpt-4o-mini-2024-07-18", "0.6"),
        ("openai", "gpt-5", "10"),
        ("anthropic", "claude-sonnet-4-5-20250929", "15"),
        ("cohere", "command-a-03-2025", "10"),
        ("scripted", "story", "4"),
        ("openai", "gpt-4o-audio-preview", None),
        ("openai", "gpt-4o-mini-tts", None),
        ("gateway", "gpt-4o", None),
    ],
)
def test_shipped_prices_are_found_by_the_model_that_answers(provider: str, model: str, output: str | None) -> None:
    assert shipped(provider, model).get("output") == (None if output is None else Decimal(output))


def test_a_class_without_an_equally_specific_price_uses_its_parents_price() -> None:
    general = [price("input", "5", model="*"), price("cached_input", "3", model="*")]
    special = price("input", "1", model="gpt-4o")
    book = PriceBook(1, [*general, special])

    def cached(model: str) -> str:
        found = book.price("openai", model, "cached_input", SINCE)
        assert found is not None
        return str(found.amount)

    assert (cached("gpt-4o"), cached("gpt-5")) == ("1", "3")
    assert book.price("openai", "gpt-4o", "output", SINCE) is None
    assert PriceBook(1, [price("output", "9")]).price("openai", "gpt", "reasoning", SINCE) is not None


def test_model_patterns_match_other_characters_literally() -> None:
    assert chosen(price(model="a.b[c]+?"), model="a.b[c]+d") == "2.50"
    assert chosen(price(model="a.b[c]+?"), model="axb[c]+d") is None


def test_a_toml_file_has_a_row_for_each_class() -> None:
    rows = parse_toml(BOOK_TOML)
    assert [(r.token_class, r.amount, r.currency) for r in rows] == [
        ("input", Decimal("2.50"), "USD"),
        ("cached_input", Decimal("1.25"), "USD"),
        ("output", Decimal(10), "USD"),
    ]
    assert {r.valid_from for r in rows} == {1_599_955_200_000}


def test_a_toml_number_is_read_exactly() -> None:
    assert parse_toml(BOOK_TOML.replace('"2.50"', "0.100001"))[0].amount == Decimal("0.100001")


def test_every_fault_of_a_toml_file_is_reported_with_its_line() -> None:
    text = """colour = "blue"
[[price]]
provider = "openai"
model = "gpt"
currency = "usd"
from = 2026-01-01
input = "free"

[[price]]
provider = ""
model = "gpt"
from = "yesterday"
currency = "USD"
until = 2026-01-01
output = 1e-9
shade = 3

[[price]]
provider = "a"
model = "b"
currency = "EUR"
from = 2026-01-01
"""
    with pytest.raises(BadPrices) as caught:
        parse_toml(text)
    told = [(f.line, f.message.split(":")[0]) for f in caught.value.faults]
    assert told == [
        (1, "no such key"),
        (7, "amount"),
        (7, "currency"),
        (15, "amount"),
        (15, "from"),
        (15, "provider"),
        (16, "no such key"),
        (18, "this table has no price; classes"),
    ]


@pytest.mark.parametrize(("text", "line"), [("a = [\n\n", 2), ("price = 3", 1), ("[[price]]\n", 1), ("x = '\n", 1)])
def test_invalid_toml_is_reported_with_its_line(text: str, line: int) -> None:
    with pytest.raises(BadPrices) as caught:
        parse_toml(text)
    assert caught.value.faults[0].line == line


def test_csv_and_json_round_trip() -> None:
    rows = [
        *parse_toml(BOOK_TOML),
        price("per_request", "0.01", valid_from=SINCE + 1, valid_until=SINCE + DAY, model='a,"b'),
    ]
    records = render_rows(rows)
    assert parse_json(msgspec.json.encode({"prices": records})) == rows
    lines = [",".join(records[0])]
    lines += [",".join('"' + v.replace('"', '""') + '"' for v in record.values()) for record in records]
    assert parse_csv("\n".join(lines)) == rows


def test_every_fault_of_a_csv_file_is_reported_with_its_line() -> None:
    text = (
        "provider,model,class,currency,amount,from\n"
        "a,b,input,USD,1,2026-01-01\n"
        "\n"
        "a,b,inputs,USD,1,2026-01-01\n"
        "a,b,input,USD\n"
        "a,b,input,USD,2,2026-01-01\n"
        "a,b,output,USD,-2,2026-13-01\n"
    )
    with pytest.raises(BadPrices) as caught:
        parse_csv(text)
    assert [f.line for f in caught.value.faults] == [4, 5, 6, 7, 7]
    assert "as in line 2" in caught.value.faults[2].message
    with pytest.raises(BadPrices):
        parse_csv("provider,model\n")


@given(st.text(max_size=300) | st.sampled_from([BOOK_TOML, "provider,model,class,currency,amount,from\n,,,,,\n"]))
def test_any_text_is_prices_or_faults(text: str) -> None:
    for parse in (parse_toml, parse_csv):
        with suppress(BadPrices):
            assert all(row.token_class in CLASSES for row in parse(text))
