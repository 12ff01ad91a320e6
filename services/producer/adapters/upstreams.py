"""Build the upstreams of all providers in the registry over one shared HTTP session."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import aiohttp

from services.kit.clock import Clock
from services.producer.adapters.http_upstream import HttpUpstream, upstream_session
from services.producer.adapters.scripted import ScriptedUpstream
from services.producer.core.dialects import DialectName, dialect_of
from services.producer.core.registry import SCRIPTED, Provider, Registry
from services.producer.ports import Upstream

__all__ = ["Upstreams", "build_upstream"]


def build_upstream(provider: Provider, session: aiohttp.ClientSession, clock: Clock) -> Upstream:
    """Return the upstream that speaks this provider's dialect."""
    if provider.dialect == SCRIPTED:
        return ScriptedUpstream(clock)
    dialect = dialect_of(cast(DialectName, provider.dialect), provider.include_usage, provider.base_url)
    return HttpUpstream(session, provider, dialect, clock)


class Upstreams:
    """The upstreams of all configured providers."""

    def __init__(self, by_name: dict[str, Upstream]) -> None:
        self._by_name = by_name

    @classmethod
    @asynccontextmanager
    async def opened(cls, registry: Registry, clock: Clock, limit: int = 0) -> AsyncIterator["Upstreams"]:
        """Share one session while the context is open; at most ``limit`` connections (0: no bound)."""
        async with upstream_session(limit) as session:
            yield cls({name: build_upstream(p, session, clock) for name, p in registry.providers.items()})

    def of(self, provider: Provider) -> Upstream:
        """Return the upstream of a provider of the registry."""
        return self._by_name[provider.name]
