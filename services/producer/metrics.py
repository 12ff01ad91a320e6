"""Metrics of the producer."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from services.kit.stages import stage

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

ACTIVE: Final = Gauge("tailrace_producer_active_generations", "Running generations")
SLOTS: Final = Gauge("tailrace_producer_slots", "Largest number of running generations")
TAKEN: Final = Counter("tailrace_producer_requests_taken", "Requests taken from the queue")
ENDED: Final = Counter("tailrace_producer_generations_ended", "Generations by terminal", ["terminal", "code"])
EVENTS: Final = Counter("tailrace_producer_events_published", "Events published to the log")
READS: Final = Counter("tailrace_producer_upstream_reads", "Non-empty socket reads from providers")
TOKENS: Final = Counter("tailrace_producer_tokens_counted", "Output tokens, counted at the end of each call")
PUBLISH_WINDOW: Final = Gauge("tailrace_producer_publish_window_events", "Unacknowledged events")
PUBLISH_REPEATS: Final = Counter("tailrace_producer_publish_repeats", "Events sent again by go-back-N")
LOG_REFUSALS: Final = Counter("tailrace_producer_log_refusals", "Appends that the log refused: full, or no leader")
QUEUE_WAIT: Final = Histogram("tailrace_producer_queue_wait_seconds", "Time from request to its run", buckets=_SECONDS)
FIRST_TOKEN: Final = Histogram(
    "tailrace_producer_first_token_seconds",
    "Time from the call of the provider to its first token",
    ["provider"],
    buckets=_SECONDS,
)
TOKEN_GAP: Final = Histogram(
    "tailrace_producer_token_gap_seconds", "Time between two reads with tokens", buckets=_SECONDS
)
UPSTREAM_ERRORS: Final = Counter("tailrace_producer_upstream_errors", "Refused and failed calls", ["provider", "code"])
STALLS: Final = Counter("tailrace_producer_stalls", "Pauses of more than a second within an answer")
LEASES_LOST: Final = Counter("tailrace_producer_leases_lost", "Generations abandoned because their lease was lost")
LEASES_RESUMED: Final = Counter(
    "tailrace_producer_leases_resumed", "Leases that lapsed while the broker was silent and were resumed"
)
LEFT_TO_HOLDERS: Final = Counter(
    "tailrace_producer_left_to_holders", "Redelivered requests left to the producer that still runs them"
)
LOST_ANSWERS: Final = Counter(
    "tailrace_producer_lost_answers", "Running answers whose acknowledged events were lost by the log"
)
ORPHANS: Final = Counter(
    "tailrace_producer_orphans_closed", "Generations closed because their request or stored events were lost", ["code"]
)
TAKEOVERS: Final = Counter("tailrace_producer_takeovers", "Begun generations taken over from another producer", ["how"])
RETRIES: Final = Counter("tailrace_producer_retries", "Retried calls", ["provider", "code"])
FAILOVERS: Final = Counter("tailrace_producer_failovers", "Failovers to another candidate", ["provider"])
REFUSALS: Final = Counter(
    "tailrace_producer_upstream_refusals",
    "Calls refused by a configured candidate until an operator acts: key, balance, permission, model",
    ["provider", "code"],
)
CIRCUIT: Final = Gauge(
    "tailrace_producer_circuit_state",
    "Circuit of a provider's connections: 0 closed, 1 half open, 2 open",
    ["provider"],
)
MODEL_CIRCUITS: Final = Gauge(
    "tailrace_producer_model_circuits_open", "Models of a provider whose circuit is not closed", ["provider"]
)
LIMITED: Final = Gauge("tailrace_producer_gate_waiting", "Calls waiting for a limit of their provider", ["provider"])
LATE_USAGE: Final = Counter(
    "tailrace_producer_late_usage", "Usage look-ups after the end of a call", ["provider", "outcome"]
)
TAKEN_STAGE: Final = stage("taken")
BEGUN_STAGE: Final = stage("begun")
ANSWERED_STAGE: Final = stage("answered")
APPENDED_STAGE: Final = stage("appended")
