"""Test whether a log continues the one that was marked."""

import pytest

from schemas.log_marks import Mark, beyond, decode_mark, incarnation, mark_subject, regression

MARK = Mark(created="c", seq=100, stamp=7)


@pytest.mark.parametrize(
    ("created", "last_seq", "stamp", "why"),
    [
        ("c", 100, 7, None),
        ("c", 150, 7, None),
        ("c", 150, None, None),
        ("c", 99, None, "it ends at 99, but had reached 100"),
        ("c", 150, 8, "its message at 100 has changed"),
        ("d", 150, 7, "the stream was re-created"),
    ],
)
def test_a_log_is_compared_with_its_mark(created: str, last_seq: int, stamp: int | None, why: str | None) -> None:
    assert regression(MARK, created, last_seq, stamp) == why


@pytest.mark.parametrize(
    ("last_seq", "first_later", "base"), [(60, None, 60), (150, 61, 60), (150, None, 99), (0, None, 0), (150, 1, 0)]
)
def test_the_kept_part_of_a_log_ends_before_the_first_later_event(
    last_seq: int, first_later: int | None, base: int
) -> None:
    assert beyond(MARK, last_seq, first_later) == base


def test_an_incarnation_differs_between_eras_and_streams() -> None:
    assert len({incarnation("c", ""), incarnation("c", "e"), incarnation("c", "f"), incarnation("d", "e")}) == 4


def test_an_invalid_mark_is_none() -> None:
    assert decode_mark(b"{}") is None
    assert decode_mark(b"") is None
    assert mark_subject(3) == "$KV.registry.log.3"
