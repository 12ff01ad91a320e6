"""Open streams by whose they are: bounded for each tenant and key, and ended when a key is revoked."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from services.delivery import metrics
from services.kit.auth.principal import Principal
from services.kit.problem import Problem

__all__ = ["Connections"]

RETRY_SECONDS: Final = 5
End = Callable[[str], None]
T = TypeVar("T")


class Connections:
    """Streams that are open in this process. ``None`` bounds nothing; ``total`` bounds those of all tenants."""

    def __init__(self, *, total: int | None = None, tenant: int | None = None, key: int | None = None) -> None:
        self._total = total
        self._tenant = tenant
        self._key = key
        self._tenants: Counter[str] = Counter()  # bounded by the number of open streams, as is all below
        self._keys: Counter[tuple[str, str]] = Counter()
        self._ends: dict[tuple[str, str], dict[object, End]] = {}
        self.open = 0

    def check(self, principal: Principal) -> None:
        """Refuse a stream that would be one too many.

        Raises:
            Problem: 429 for a tenant or key that has as many as it may, 503 when the replica has.
        """
        key = (principal.tenant, principal.key)
        if self._total is not None and self.open >= self._total:
            raise _refused(503, "replica", f"this replica has {self._total} open streams")
        if self._tenant is not None and self._tenants[principal.tenant] >= self._tenant:
            raise _refused(429, "tenant", f"the tenant has {self._tenant} open streams on this replica")
        if self._key is not None and self._keys[key] >= self._key:
            raise _refused(429, "key", f"the credentials have {self._key} open streams on this replica")

    @contextmanager
    def held(self, principal: Principal, end: End) -> Iterator[None]:
        """Count a stream while the block runs. ``end`` is called with a reason when its key is revoked meanwhile."""
        key, entry = (principal.tenant, principal.key), object()
        self.open += 1
        self._tenants[principal.tenant] += 1
        self._keys[key] += 1
        self._ends.setdefault(key, {})[entry] = end
        try:
            yield
        finally:
            self.open -= 1
            _decrease(self._tenants, principal.tenant)
            _decrease(self._keys, key)
            del self._ends[key][entry]
            if not self._ends[key]:
                del self._ends[key]

    def revoke(self, keys: frozenset[str]) -> None:
        """End the streams of keys that are not valid any more."""
        ends = [end for (_, key), each in self._ends.items() if key in keys for end in each.values()]
        for end in ends:
            end("expired")


def _decrease(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _refused(status: int, whose: str, detail: str) -> Problem:
    metrics.LIMITED.labels("streams", whose).inc()
    return Problem(
        status, detail, slug="too-many-streams", title="Too many streams", headers={"Retry-After": str(RETRY_SECONDS)}
    )
