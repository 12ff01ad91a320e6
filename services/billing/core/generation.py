"""The billing state of one generation. Field names are the columns of the table ``generations``."""

from decimal import Decimal
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.acceptance import Position
from services.billing.core.money import ZERO

__all__ = ["DELIVERED", "EXPORT", "PRICINGS", "STATUSES", "Generation", "Key", "Pricing", "Status"]

Status = Literal["running", "matched", "drift", "awaiting_provider", "provider_missing", "partial"]
STATUSES: Final = ("running", "matched", "drift", "awaiting_provider", "provider_missing", "partial")

Pricing = Literal["pending", "charged", "unpriced", "waived"]
PRICINGS: Final = ("pending", "charged", "unpriced", "waived")
EXPORT: Final = "provider_export"
"""Usage source of a provider's export, which takes precedence over the log in any order of arrival."""
DELIVERED: Final = ("subscribers", "delivered_events", "delivered_tokens", "delivered_bytes")
"""Fields set from delivery's reports; the fold neither reads nor writes them."""


class Key(NamedTuple):
    """The key of a generation, from its subject in the log."""

    tenant: str
    session: str
    generation: str


class Generation(msgspec.Struct, kw_only=True):
    """One generation, folded from its events. Times in milliseconds since 1970 (producer's clock); sizes in tokens.

    ``log_seq``: stream sequence of the last event that changed the row. ``epoch``, ``next_seq``: position of the
    acceptance rule. ``headless``: its first events had expired before they were read; counts are still right, because
    events carry running totals. ``state``: ``running`` or the type of its terminal; ``status``: the outcome of
    reconciliation. ``code``: finish reason, failure code or reason of the end. ``counted_…``: Tailrace's own count.
    ``input`` … ``reasoning``: the provider's report, ``None`` without one; ``usage`` is that report as JSON.
    ``drift_…``: reported minus counted; ``reasons``: the known causes, separated by commas. ``settle_at``: time of the
    next decision. ``upstream_id``: the provider's name of the generation. ``metadata``: the request's labels as JSON.
    ``credential``: the name of the key that made the request. ``pricing``: pending, charged, unpriced (no price known),
    or waived by policy. ``amount`` in ``currency`` is the sum of its ``entries`` ledger entries, computed from
    ``tokens``. ``subscribers`` and ``delivered_…``: delivery to subscribers, ``None`` before the first report. The
    remaining fields count dropped events.
    """

    tenant: str
    session: str
    generation: str
    partition: int
    log_seq: int = 0
    epoch: int = 0
    next_seq: int = 0
    headless: bool = False
    state: str = "running"
    status: Status = "running"
    code: str = ""
    model: str = ""
    provider: str = ""
    upstream_model: str = ""
    started_at: int = 0
    ended_at: int | None = None
    reported_at: int | None = None
    settle_at: int | None = None
    counted_input: int = 0
    counted_output: int = 0
    counted_exact: bool = False
    encoding: str = ""
    input: int | None = None
    output: int | None = None
    cached_input: int | None = None
    cache_write: int | None = None
    cache_write_1h: int | None = None
    reasoning: int | None = None
    calls: str = ""
    usage: str | None = None
    usage_source: str = ""
    drift_input: int | None = None
    drift_output: int | None = None
    reasons: str = ""
    upstream_id: str = ""
    metadata: str = ""
    credential: str = ""
    pricing: Pricing = "pending"
    amount: Decimal = ZERO
    currency: str = ""
    entries: int = 0
    tokens: int = 0
    subscribers: int | None = None
    delivered_events: int | None = None
    delivered_tokens: int | None = None
    delivered_bytes: int | None = None
    duplicates: int = 0
    gaps: int = 0
    zombies: int = 0
    late: int = 0
    unknown: int = 0
    malformed: int = 0

    @property
    def key(self) -> Key:
        """Return its key."""
        return Key(self.tenant, self.session, self.generation)

    @property
    def ended(self) -> bool:
        """Return whether its terminal has been accepted."""
        return self.state != "running"

    @property
    def position(self) -> Position:
        """Return the position of its last accepted event."""
        return Position(self.epoch, self.next_seq, self.ended)
