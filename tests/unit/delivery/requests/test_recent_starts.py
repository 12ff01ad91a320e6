"""The generations that a replica has just accepted."""

import pytest

from schemas.cursor import CursorIssuer
from schemas.requests import DeletedSession, GenerationRecord
from services.delivery.requests import recent_starts
from services.delivery.requests.recent_starts import SECONDS, RecentStarts

ISSUER = CursorIssuer(0, "2026-11-28T00:00:00Z", "t", "s")


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def record(generation: str, session: str = "s") -> GenerationRecord:
    return GenerationRecord(
        tenant="t", session=session, generation=generation, state="queued", model="m", created_at=1.0
    )


def test_a_start_is_known_until_its_time_is_over() -> None:
    clock = Clock()
    starts = RecentStarts(clock)
    starts.add(record("g"), ISSUER, 7, is_first=True)
    found = starts.get("t", "s", "g")
    assert found is not None
    assert (found.record.generation, found.seq, found.is_first) == ("g", 7, True)
    assert starts.get("t", "s", "other") is None
    clock.now += SECONDS
    assert starts.get("t", "s", "g") is None


def test_the_number_of_starts_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_starts, "BOUND", 3)
    starts = RecentStarts(Clock())
    for number in range(5):
        starts.add(record(f"g{number}"), ISSUER, number, is_first=False)
    assert [starts.get("t", "s", f"g{n}") is not None for n in range(5)] == [False, False, True, True, True]


async def test_a_deleted_session_is_forgotten() -> None:
    starts = RecentStarts(Clock())
    starts.add(record("g"), ISSUER, 7, is_first=True)
    starts.add(record("g", "other"), ISSUER, 7, is_first=True)
    await starts.forget(
        DeletedSession(tenant="t", session="s", partition=0, incarnation="i", through=9, deleted_at=1.0)
    )
    assert starts.get("t", "s", "g") is None
    assert starts.get("t", "other", "g") is not None
