"""Remember the generations that this replica has just accepted, so that their first reader needs no look-up."""

from typing import Final, NamedTuple

from schemas.cursor import CursorIssuer
from schemas.requests import DeletedSession, GenerationRecord
from services.kit.clock import Clock

__all__ = ["RecentStart", "RecentStarts"]

SECONDS: Final = 10.0
BOUND: Final = 10_000


class RecentStart(NamedTuple):
    """An accepted generation: its record as created, and the stream sequence before its first event.

    ``is_first``: whether the log held no event of its session then.
    """

    record: GenerationRecord
    issuer: CursorIssuer
    seq: int
    is_first: bool
    at: float


class RecentStarts:
    """Keep the last `BOUND` starts for `SECONDS`. A record here is as created; the stored one may be newer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._starts: dict[tuple[str, str, str], RecentStart] = {}  # by age; bounded by BOUND

    def add(self, record: GenerationRecord, issuer: CursorIssuer, seq: int, *, is_first: bool) -> None:
        """Remember a start whose request was queued; ``seq``: stream sequence before its first event."""
        now = self._clock.monotonic()
        while self._starts:
            oldest = next(iter(self._starts))
            if len(self._starts) < BOUND and now - self._starts[oldest].at < SECONDS:
                break
            del self._starts[oldest]
        self._starts[record.tenant, record.session, record.generation] = RecentStart(record, issuer, seq, is_first, now)

    def get(self, tenant: str, session: str, generation: str) -> RecentStart | None:
        """Return a start of the last `SECONDS`."""
        found = self._starts.get((tenant, session, generation))
        return found if found is not None and self._clock.monotonic() - found.at < SECONDS else None

    async def forget(self, deleted: DeletedSession) -> None:
        """Forget the starts of a deleted session."""
        for key in [key for key in self._starts if key[:2] == (deleted.tenant, deleted.session)]:
            del self._starts[key]
