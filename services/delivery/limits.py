"""Bounds of a delivery process."""

from typing import Literal

import msgspec

__all__ = ["ConsumerLimits", "Fallback", "Limits", "StartBounds"]

Fallback = Literal["refuse", "allow"]


class StartBounds(msgspec.Struct, frozen=True, kw_only=True):
    """``None`` bounds nothing. Rates count all replicas; a repeated request counts too."""

    tenant_rate: int | None = None
    key_rate: int | None = None
    tenant_running: int | None = None
    key_running: int | None = None

    @property
    def bounds_running(self) -> bool:
        """Whether it matters how many run."""
        return self.tenant_running is not None or self.key_running is not None


class ConsumerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of durable consumers.

    ``consumers``: of a tenant. ``inactive``: seconds after which an unread one goes; 0 is never. ``dead``: dead events
    kept for a consumer.
    """

    consumers: int = 100
    inactive: float = 604_800.0
    dead: int = 1_000


class Limits:
    """Bounds of a process. Times in seconds, sizes in bytes.

    ``feed_bytes``: events kept in memory for one session. ``feeds``: sessions followed at once. ``linger``: how long a
    feed outlives its last subscriber. ``heartbeat``: silence before a comment is sent. ``lifetime``: how long a stream
    lasts at most (with up to a fifth taken off at random). ``stall``: how long a client may take nothing. ``streams``:
    open at once, in all, of a tenant and with a key.
    """

    def __init__(
        self,
        *,
        feed_bytes: int = 4 * 1024 * 1024,
        feeds: int = 20_000,
        linger: float = 30.0,
        heartbeat: float = 15.0,
        lifetime: float = 3_600.0,
        stall: float = 30.0,
        streams: int | None = None,
        streams_per_tenant: int | None = None,
        streams_per_key: int | None = None,
        starts: StartBounds | None = None,
    ) -> None:
        self.feed_bytes = feed_bytes
        self.feeds = feeds
        self.linger = linger
        self.heartbeat = heartbeat
        self.lifetime = lifetime
        self.stall = stall
        self.streams = streams
        self.streams_per_tenant = streams_per_tenant
        self.streams_per_key = streams_per_key
        self.starts = starts or StartBounds()
