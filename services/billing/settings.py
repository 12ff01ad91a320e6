"""Settings of billing, from environment variables."""

from typing import Annotated, Final, cast, get_args

import msgspec

from services.billing.core.charging import Basis, CallBasis, Charging
from services.billing.core.reconciliation import Policy, Tolerance
from services.billing.database_url import database_url

__all__ = ["Settings"]

BASES: Final[tuple[str, ...]] = get_args(Basis)
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of billing. Times in seconds, sizes in tokens or events.

    ``tls_cert`` and ``tls_key``: files for TLS.
    ``database_url``: ``sqlite:///…`` or ``postgresql://…``; without one a file ``billing.db`` in the data folder.
    ``tolerance_absolute`` and ``tolerance_relative``: counted and reported match when they differ by no more than the
    larger of the two. ``grace``: how long a provider may take to report. ``batch``, ``interval``: bound of a
    transaction in events, and time between pulls. ``hold``: time after a crash until another process takes over its
    partitions. ``max_body``: bound of a price file or an export in bytes. ``drain``: time for the current batch after
    SIGTERM.

    ``reservation``: time until the budget reservation of a generation that does not begin is released.

    ``prices``: a price file (TOML or CSV) that becomes the price book when its content has changed.
    ``shipped_prices``: use the prices shipped with Tailrace until there is another price book.
    ``partial``: charging policy of generations that failed, were cancelled or interrupted; ``abandoned``: of calls that
    did not become the answer; ``tenant_partial``: overrides of both for single tenants, as ``tenant=policy``.
    ``missing``: charging policy of completed generations without a provider report.
    ``tolerances``: tolerances of some models, as ``provider/model=absolute/relative`` with ``*`` and ``?``.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 8081
    tls_cert: str | None = None
    tls_key: str | None = None
    database_url: str | None = None
    tolerance_absolute: Annotated[int, msgspec.Meta(ge=0)] = 8
    tolerance_relative: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    grace: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    tolerances: list[str] = []
    prices: str | None = None
    shipped_prices: bool = True
    partial: Basis = "counted"
    abandoned: CallBasis = "provider"
    tenant_partial: list[str] = []
    missing: Basis = "counted"
    batch: Annotated[int, msgspec.Meta(ge=1, le=20_000)] = 10_000
    interval: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.5
    hold: Annotated[float, msgspec.Meta(ge=1)] = 5.0
    drain: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    reservation: Positive = 3_600.0
    connections: Annotated[int, msgspec.Meta(ge=1)] = 512
    max_body: Annotated[int, msgspec.Meta(ge=1_024)] = 67_108_864
    cors_origins: list[str] = []

    def __post_init__(self) -> None:
        if self.database_url is not None:
            try:
                database_url(self.database_url)
            except ValueError as error:
                raise ValueError(f"TAILRACE_BILLING_DATABASE_URL: {error}") from error
        self.policy()
        self.charging()

    def policy(self) -> Policy:
        """Return the reconciliation policy.

        Raises:
            ValueError: a tolerance is malformed.
        """
        return Policy(
            absolute=self.tolerance_absolute,
            relative=self.tolerance_relative,
            grace=self.grace,
            models=tuple(_tolerance(text) for text in self.tolerances),
        )

    def charging(self) -> Charging:
        """Return the charging policy.

        Raises:
            ValueError: a tenant's policy is malformed.
        """
        pairs = [text.partition("=") for text in self.tenant_partial]
        wrong = [text for text, (_, _, basis) in zip(self.tenant_partial, pairs, strict=True) if basis not in BASES]
        if wrong:
            raise ValueError(f"TAILRACE_BILLING_TENANT_PARTIAL: {wrong[0]!r} is not tenant={'|'.join(BASES)}")
        tenants = {tenant: cast(Basis, basis) for tenant, _, basis in pairs}
        return Charging(partial=self.partial, missing=self.missing, abandoned=self.abandoned, tenants=tenants)


def _tolerance(text: str) -> Tolerance:
    model, _, numbers = text.rpartition("=")
    absolute, _, relative = numbers.partition("/")
    try:
        made = Tolerance(model=model, absolute=int(absolute), relative=float(relative))
        if not model or made.absolute < 0 or not 0 <= made.relative <= 1:
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"TAILRACE_BILLING_TOLERANCES: {text!r} is not provider/model=tokens/share such as openai/gpt-*=8/0.02"
        ) from error
    return made
