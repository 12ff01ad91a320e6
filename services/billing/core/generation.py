"""What billing knows of one generation. Field names are the columns of the table ``generations``."""

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
"""Source of usage that a provider's export tells: it outweighs whatever the log says, whichever comes first."""
DELIVERED: Final = ("subscribers", "delivered_events", "delivered_tokens", "delivered_bytes")
"""Fields that delivery's reports fill, beside the fold: the fold neither writes nor needs them."""


class Key(NamedTuple):
    """The identity of a generation, as its subject in the log gives it."""

    tenant: str
    session: str
    generation: str


class Generation(msgspec.Struct, kw_only=True):
    """One generation, folded from its events. Times in milliseconds since 1970 (producer's clock); sizes in tokens.

    ``log_seq``: stream sequence of the last event that changed anything here. ``epoch``, ``next_seq``: how far the
    acceptance rule has come. ``headless``: its first events had expired before they were read; counts are still right,
    because events carry running totals. ``state``: ``running`` or the type of its terminal; ``status``: the outcome of
    reconciliation. ``code``: finish reason, failure code or reason of the end. ``counted_…``: Tailrace's own count.
    ``input`` … ``reasoning``: what the provider reported, ``None`` without a report; ``usage`` is that report as JSON.
    ``drift_…``: reported minus counted; ``reasons``: why, as far as that can be known, by commas. ``settle_at``: when
    the next decision is due. ``upstream_id``: the provider's name for it. ``metadata``: the request's labels as JSON.
    ``credential``: who asked, by the name of the key.
    ``pricing``: whether money has been asked for it: not decided yet, charged, no price known, or waived by policy.
    ``amount`` in ``currency`` is the sum of its ``entries`` entries in the ledger, reckoned by ``tokens``.
    ``subscribers`` and ``delivered_…``: what subscribers were sent, ``None`` before the first report. The rest counts
    dropped events.
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
        """Its identity."""
        return Key(self.tenant, self.session, self.generation)

    @property
    def ended(self) -> bool:
        """Whether its terminal has been accepted."""
        return self.state != "running"

    @property
    def position(self) -> Position:
        """How far its events have been accepted."""
        return Position(self.epoch, self.next_seq, self.ended)
