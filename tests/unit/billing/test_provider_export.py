"""Test the parsing of providers' usage exports."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.usage import Usage
from services.billing.core.provider_export import BadExport, parse_export


def one(record: dict[str, object], provider: str = "") -> Usage:
    [row] = parse_export("json", json.dumps([record]).encode(), provider)
    assert row.usage.raw == record
    return Usage(**{n: getattr(row.usage, n) for n in Usage.__struct_fields__ if n != "raw"})


def test_tailrace_field_names_are_accepted() -> None:
    row = {"generation": "g", "input": 10, "output": "20", "cached_input": 3, "cache_write": 1, "reasoning": 2}
    assert one(row) == Usage(input=10, output=20, cached_input=3, cache_write=1, reasoning=2)


def test_an_openai_usage_object_is_accepted() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 40},
    }
    assert one({"id": "chatcmpl-1", "usage": usage}) == Usage(input=100, output=50, cached_input=30, reasoning=40)


def test_anthropic_input_excludes_cached_tokens() -> None:
    usage = {
        "input_tokens": 10,
        "output_tokens": 50,
        "cache_read_input_tokens": 70,
        "cache_creation_input_tokens": 20,
    }
    assert one({"message_id": "msg_1", **usage}) == Usage(input=100, output=50, cached_input=70, cache_write=20)
    lifetimes = {"cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 15}}
    expected = Usage(input=100, output=50, cached_input=70, cache_write=20, cache_write_1h=15)
    assert one({"message_id": "msg_1", **usage, **lifetimes}) == expected
    del usage["cache_creation_input_tokens"]
    assert one({"message_id": "msg_1", **usage, **lifetimes}) == expected


def test_an_export_with_inconsistent_classes_is_accepted_with_a_reason() -> None:
    row = {"generation": "g", "input": 10, "output": 20, "reasoning": 25, "cache_write_1h": 12}
    assert one(row) == Usage(
        input=12, output=25, cache_write=12, cache_write_1h=12, reasoning=25, reasons=("usage_inconsistent",)
    )


def test_cohere_billed_units_are_kept_beside_its_tokens() -> None:
    usage = {
        "billed_units": {"input_tokens": 8.0, "output_tokens": 9},
        "tokens": {"input_tokens": 80, "output_tokens": 10},
    }
    assert one({"id": "c", "usage": usage}) == Usage(input=80, output=10, billed_input=8, billed_output=9)
    assert one({"id": "c", "usage": {"billed_units": {"input_tokens": 8, "output_tokens": 9}}}).input == 8


def test_openrouter_activity_is_read_by_its_native_counts() -> None:
    text = (
        "generation_id,created_at,cost_total,tokens_prompt,tokens_completion,native_tokens_prompt,"
        "native_tokens_completion,native_tokens_reasoning\n"
        "gen-17,2026-01-01,0.00012,90,40,100,50,7\n"
    )
    [row] = parse_export("csv", text.encode(), "openrouter")
    assert (row.generation, row.upstream_id, row.provider) == ("", "gen-17", "openrouter")
    assert (row.usage.input, row.usage.output, row.usage.reasoning) == (100, 50, 7)
    assert (row.usage.cost, row.usage.currency) == ("0.00012", "USD")


def test_the_same_row_has_the_same_digest_in_csv_and_json() -> None:
    [csv] = parse_export("csv", b"output,input,generation\n2,1,g\n", "openai")
    [js] = parse_export(
        "json", b'{"rows": [{"generation": "g", "prompt_tokens": 1, "completion_tokens": 2.0}]}', "openai"
    )
    [other] = parse_export("json", b'[{"generation": "g", "input": 1, "output": 3, "provider": "openai"}]')
    assert csv.digest == js.digest != other.digest


def test_every_fault_is_reported_with_its_row() -> None:
    rows = [
        {"generation": "g", "input": 1, "output": 2},
        {"input": 1, "output": 2},
        {"generation": "a b", "input": 1, "output": 2},
        {"generation": "g", "output": 2},
        {"generation": "g", "input": -1, "output": 2},
        {"generation": "g", "input": 1.5, "output": 2},
        {"generation": "g", "input": True, "output": 2},
        {"generation": "g", "input": 1, "output": 2, "cost": "much"},
    ]
    with pytest.raises(BadExport) as caught:
        parse_export("json", json.dumps(rows).encode())
    assert [f.row for f in caught.value.faults] == [2, 3, 4, 5, 6, 7, 8]


@given(st.sampled_from(["csv", "json"]), st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_rows_or_faults(kind: str, data: bytes) -> None:
    with suppress(BadExport):
        assert isinstance(parse_export(kind, data), list)
