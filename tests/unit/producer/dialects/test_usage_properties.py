"""Test that usage read from any object is sound and that reports of one answer only grow."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import decode_event, encode_event
from schemas.events import UsageReported
from schemas.usage import COUNTS, MAX_NUMBER, USAGE_REASONS, Usage, grown, nested
from services.producer.core.dialects.usage import STANDARD, UsageRules, read_usage, together
from tests.support.struct_strategies import JSON
from tests.unit.producer.dialects.test_usage import CASES, GEMINI, OPENROUTER, PERPLEXITY, XAI

_NAMES = st.sampled_from(
    sorted(
        {name for raw, _, _ in CASES.values() for name in raw}
        | {name for raw, _, _ in CASES.values() for inner in raw.values() if isinstance(inner, dict) for name in inner}
    )
)
_VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-10, 5_000)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.integers(0, 999).map(str)
    | st.decimals()
    | st.sampled_from([2**53 - 1, 2**53, 2**63, 2**64, -0.0, 1e300, "1e5", Decimal("1e999999")])
)
_OBJECTS = st.recursive(
    _VALUES | JSON,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=15,
)
_RULES = st.sampled_from([STANDARD, XAI, PERPLEXITY, GEMINI, OPENROUTER])
_USAGES = st.dictionaries(_NAMES, _OBJECTS, max_size=8) | _OBJECTS


def assert_sound(usage: Usage) -> None:
    assert all(0 <= getattr(usage, name) <= MAX_NUMBER for name in COUNTS)
    assert usage.cached_input + usage.cache_write <= usage.input
    assert usage.cache_write_1h <= usage.cache_write
    assert usage.reasoning <= usage.output
    assert set(usage.reasons) <= set(USAGE_REASONS)
    event = UsageReported(generation="g", seq=0, usage=usage)
    assert decode_event(encode_event(event)) == event  # no reader refuses it


@settings(max_examples=500, deadline=None)
@given(_USAGES, _RULES)
def test_any_usage_object_is_read_with_nested_classes(raw: Any, rules: UsageRules) -> None:
    usage, reasons = read_usage(raw, rules)
    assert set(reasons) <= set(USAGE_REASONS)
    if usage is not None:
        assert_sound(usage)
        assert nested(usage) == usage


@settings(max_examples=200, deadline=None)
@given(st.lists(_USAGES, min_size=1, max_size=5), _RULES)
def test_reports_of_one_answer_only_grow(raws: list[Any], rules: UsageRules) -> None:
    reports = [usage for raw in raws if (usage := read_usage(raw, rules).usage) is not None]
    if not reports:
        return
    whole = reports[0]
    for report in reports[1:]:
        before, whole = whole, grown(whole, report)
        assert_sound(whole)
        assert all(getattr(whole, name) >= max(getattr(before, name), getattr(report, name)) for name in COUNTS)
        assert set(before.reasons) <= set(whole.reasons)
    assert_sound(together(reports))


@pytest.mark.parametrize("later", [Usage(), Usage(raw={"completion_tokens": 0})])
def test_an_empty_report_does_not_reduce_the_counts(later: Usage) -> None:
    usage = Usage(input=15, output=3, raw={"a": 1})
    assert grown(usage, later) == usage


def test_a_smaller_report_keeps_the_larger_counts_and_adds_a_reason() -> None:
    found = grown(Usage(input=15, output=9), Usage(input=15, output=3))
    assert found == Usage(input=15, output=9, reasons=("usage_shrunk",))
