"""Bound the open streams of each tenant and key, and end them when a key is revoked."""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, TypeVar

from services.delivery import metrics
from services.kit.auth.principal import Principal
from services.kit.problem import Problem

__all__ = ["OpenStreams"]

RETRY_SECONDS: Final = 5
End = Callable[[str], None]
T = TypeVar("T")


class OpenStreams:
    """Count the open streams of this process. ``None`` means no bound; ``total`` bounds the streams of all tenants."""

    def __init__(self, *, total: int | None = None, tenant: int | None = None, key: int | None = None) -> None:
        self._total = total
        self._tenant = tenant
        self._key = key
        self._tenants: Counter[str] = Counter()  # bounded by the number of open streams, as are those below
        self._keys: Counter[tuple[str, str]] = Counter()
        self._ends: dict[tuple[str, str], dict[_Held, End]] = {}
        self.open = 0
        self.quiet = asyncio.Event()
        """Set while no stream is open."""
        self.quiet.set()

    def check(self, principal: Principal) -> None:
        """Refuse a stream that would exceed a bound.

        Raises:
            Problem: 429 at the bound of the tenant or key, 503 at the bound of the replica.
        """
        key = (principal.tenant, principal.key)
        if self._total is not None and self.open >= self._total:
            raise _refused(503, "replica", f"this replica has {self._total} open streams")
        if self._tenant is not None and self._tenants[principal.tenant] >= self._tenant:
            raise _refused(429, "tenant", f"the tenant has {self._tenant} open streams on this replica")
        if self._key is not None and self._keys[key] >= self._key:
            raise _refused(429, "key", f"the credentials have {self._key} open streams on this replica")

    def held(self, principal: Principal, end: End) -> AbstractContextManager[None]:
        """Count a stream while the block runs. ``end`` is called with the reason if its key is revoked meanwhile."""
        return _Held(self, principal, end)

    def _add(self, entry: "_Held", end: End) -> None:
        self.open += 1
        self.quiet.clear()
        self._tenants[entry.key[0]] += 1
        self._keys[entry.key] += 1
        self._ends.setdefault(entry.key, {})[entry] = end

    def _remove(self, entry: "_Held") -> None:
        self.open -= 1
        if not self.open:
            self.quiet.set()
        _decrease(self._tenants, entry.key[0])
        _decrease(self._keys, entry.key)
        del self._ends[entry.key][entry]
        if not self._ends[entry.key]:
            del self._ends[entry.key]

    def revoke(self, keys: frozenset[str]) -> None:
        """End the streams of revoked keys."""
        ends = [end for (_, key), each in self._ends.items() if key in keys for end in each.values()]
        for end in ends:
            end("expired")


class _Held:
    """Count one open stream. Takes a tenth of a generator's memory, since there are many."""

    __slots__ = ("_end", "_streams", "key")

    def __init__(self, streams: OpenStreams, principal: Principal, end: End) -> None:
        self.key = (principal.tenant, principal.key)
        self._streams = streams
        self._end = end

    def __enter__(self) -> None:
        self._streams._add(self, self._end)

    def __exit__(self, *_: object) -> None:
        self._streams._remove(self)


def _decrease(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _refused(status: int, whose: str, detail: str) -> Problem:
    metrics.LIMITED.labels("streams", whose).inc()
    return Problem(
        status, detail, slug="too-many-streams", title="Too many streams", headers={"Retry-After": str(RETRY_SECONDS)}
    )
