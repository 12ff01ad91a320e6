"""Test the detection of unreadable files in nats-server's store before it starts."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.standalone import store
from services.standalone.store import is_position, running_mark, set_aside_unreadable


def varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def position(pending: int = 0, redelivered: int = 0, *, version: int = 2) -> bytes:
    numbers = [9, 9, 10 + pending, 10 + pending, pending]
    if pending:
        numbers += [1_795_824_139, *(n for at in range(pending) for n in (at, at, 1))]
    numbers += [redelivered, *(n for at in range(redelivered) for n in (at, 2))]
    return bytes([22, version]) + b"".join(map(varint, numbers))


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_position_is_recognised(pending: int, redelivered: int) -> None:
    assert is_position(position(pending, redelivered))
    assert is_position(b"")


@given(st.integers(0, 20), st.integers(0, 20), st.data())
def test_a_truncated_position_is_not_recognised(pending: int, redelivered: int, data: st.DataObject) -> None:
    whole = position(pending, redelivered)
    assert not is_position(whole[: data.draw(st.integers(1, len(whole) - 1))])


@pytest.mark.parametrize(
    "data", [b"\x07" * 40, bytes([22, 9]) + position()[2:], bytes([22, 2]) + b"\xff" * 60, b"\0" * 64]
)
def test_other_bytes_are_not_recognised_as_a_position(data: bytes) -> None:
    assert not is_position(data)


def test_unreadable_positions_are_moved_aside_and_others_are_kept(tmp_path: Path) -> None:
    files = {}
    for name, data in {"billing-0": os.urandom(3) + b"\xff" * 30, "producers-default": position(3, 1)}.items():
        path = tmp_path / "nats" / "jetstream" / "$G" / "streams" / "S" / "obs" / name / "o.dat"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        files[name] = path
    assert set_aside_unreadable(tmp_path / "nats", tmp_path / "damaged") == ["billing-0 of S"]
    assert not files["billing-0"].exists()
    assert files["producers-default"].read_bytes() == position(3, 1)
    (kept,) = (tmp_path / "damaged").iterdir()
    assert kept.name.endswith("S-billing-0-o.dat")


@pytest.mark.parametrize(
    ("before", "now", "went_down"), [("", "a", False), ("a", "a", False), ("a", "b", True), ("a", "", False)]
)
def test_a_machine_crash_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, now: str, went_down: bool
) -> None:
    if before:
        (tmp_path / "running").write_text(before)
    monkeypatch.setattr(store, "_boot", lambda: now)
    with running_mark(tmp_path) as found:
        assert found is went_down
    assert not (tmp_path / "running").exists()
