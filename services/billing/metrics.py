"""Billing's Prometheus metrics."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "BATCH_SECONDS",
    "CHARGED",
    "CREDITED",
    "DELIVERY_REPORTS",
    "DRIFT",
    "ENTRIES",
    "EVENTS",
    "GAP",
    "HEADLESS",
    "LAG",
    "POSITION",
    "RECONNECTS",
    "REPEATS",
    "ROWS",
    "RUNNING",
    "SETTLED",
    "STALLS",
    "UNPRICED",
]

LAG: Final = Gauge("tailrace_billing_consumer_lag_events", "Events not yet delivered to billing", ["partition"])
POSITION: Final = Gauge("tailrace_billing_position_seq", "Stream sequence up to which all is applied", ["partition"])
BATCH_SECONDS: Final = Histogram(
    "tailrace_billing_batch_seconds",
    "Time from the end of a pull to its commit",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
EVENTS: Final = Counter("tailrace_billing_events_total", "Events read, by verdict", ["verdict"])
REPEATS: Final = Counter("tailrace_billing_repeats_total", "Deliveries of events that had been applied before")
ROWS: Final = Counter("tailrace_billing_rows_written_total", "Rows written, by kind", ["kind"])
RUNNING: Final = Gauge("tailrace_billing_generations_running", "Generations without a terminal in the ledger")
SETTLED: Final = Counter("tailrace_billing_generations_total", "Changes of generations into a status", ["status"])
HEADLESS: Final = Counter("tailrace_billing_headless_total", "Generations whose first events had expired unread")
DRIFT: Final = Histogram(
    "tailrace_billing_drift_ratio",
    "Difference of reported and counted output, relative to reported",
    buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
RECONNECTS: Final = Counter("tailrace_billing_reconnects_total", "Reconnections to the broker")
STALLS: Final = Counter("tailrace_billing_stalls_total", "Failures that made a partition wait, by part", ["part"])
ENTRIES: Final = Counter(
    "tailrace_billing_ledger_entries_total", "Entries written to the ledger, by kind", ["kind", "currency"]
)
CHARGED: Final = Counter("tailrace_billing_charged_total", "Amounts charged and corrected upwards", ["currency"])
CREDITED: Final = Counter("tailrace_billing_credited_total", "Amounts reversed and corrected downwards", ["currency"])
UNPRICED: Final = Counter("tailrace_billing_unpriced_total", "Generations without a price at their settlement")
GAP: Final = Counter("tailrace_billing_gap_events_total", "Stream sequences that had expired unread", ["partition"])
DELIVERY_REPORTS: Final = Counter(
    "tailrace_billing_delivery_reports_total", "Delivery reports, by outcome", ["outcome"]
)
RESERVATIONS: Final = Counter("tailrace_billing_reservations_total", "Reservation requests, by answer", ["answer"])
OVERRUNS: Final = Counter(
    "tailrace_billing_reservation_overruns_total", "Settlements that used more than was reserved, by kind", ["kind"]
)
OVERRUN_AMOUNT: Final = Counter(
    "tailrace_billing_reservation_overrun_amount_total", "Tokens or money beyond their reservation", ["unit"]
)
LIMITS_PASSED: Final = Counter(
    "tailrace_billing_hard_limits_passed_total", "Settlements beyond their reservation that exceeded a hard limit"
)
OVER_BUDGET: Final = Counter("tailrace_billing_over_budget_total", "Generations stopped at a hard limit")
