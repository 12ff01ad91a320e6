"""Metrics of the producer."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

ACTIVE: Final = Gauge("tailrace_producer_active_generations", "Generations that stream now")
SLOTS: Final = Gauge("tailrace_producer_slots", "How many generations may stream at once")
TAKEN: Final = Counter("tailrace_producer_requests_taken", "Requests taken from the queue")
ENDED: Final = Counter("tailrace_producer_generations_ended", "Generations by terminal", ["terminal", "code"])
EVENTS: Final = Counter("tailrace_producer_events_published", "Events handed to the log")
READS: Final = Counter("tailrace_producer_upstream_reads", "Socket reads from providers that held something")
TOKENS: Final = Counter("tailrace_producer_tokens_counted", "Output tokens counted when a call ends")
PUBLISH_WINDOW: Final = Gauge("tailrace_producer_publish_window_events", "Events sent and not yet acknowledged")
PUBLISH_REPEATS: Final = Counter("tailrace_producer_publish_repeats", "Events sent again by go-back-N")
LOG_REFUSALS: Final = Counter("tailrace_producer_log_refusals", "Appends that the log refused: full, or no leader")
QUEUE_WAIT: Final = Histogram("tailrace_producer_queue_wait_seconds", "From request to producer", buckets=_SECONDS)
FIRST_TOKEN: Final = Histogram(
    "tailrace_producer_first_token_seconds",
    "From calling the provider to its first token",
    ["provider"],
    buckets=_SECONDS,
)
TOKEN_GAP: Final = Histogram(
    "tailrace_producer_token_gap_seconds", "Between two reads that held tokens", buckets=_SECONDS
)
UPSTREAM_ERRORS: Final = Counter("tailrace_producer_upstream_errors", "Refusals and failures", ["provider", "code"])
STALLS: Final = Counter("tailrace_producer_stalls", "Silences of more than a second in the middle of an answer")
LEASES_LOST: Final = Counter("tailrace_producer_leases_lost", "Generations given up because the lease ran out")
LEASES_RESUMED: Final = Counter(
    "tailrace_producer_leases_resumed", "Leases that had lapsed in a silence of the broker and were held again"
)
LEFT_TO_HOLDERS: Final = Counter(
    "tailrace_producer_left_to_holders", "Requests given again and left to the producer that still runs them"
)
LOST_ANSWERS: Final = Counter(
    "tailrace_producer_lost_answers", "Running answers of which the log had lost acknowledged events"
)
ORPHANS: Final = Counter(
    "tailrace_producer_orphans_closed", "Generations closed whose request or stored events were lost", ["code"]
)
TAKEOVERS: Final = Counter("tailrace_producer_takeovers", "Begun generations taken over from another producer", ["how"])
RETRIES: Final = Counter("tailrace_producer_retries", "Calls made again", ["provider", "code"])
FAILOVERS: Final = Counter("tailrace_producer_failovers", "Turns to another candidate", ["provider"])
REFUSALS: Final = Counter(
    "tailrace_producer_upstream_refusals",
    "Calls that a configured candidate refused until somebody acts: key, balance, permission, model",
    ["provider", "code"],
)
CIRCUIT: Final = Gauge(
    "tailrace_producer_circuit_state", "Of a provider's connections: 0 closed, 1 half open, 2 open", ["provider"]
)
MODEL_CIRCUITS: Final = Gauge(
    "tailrace_producer_model_circuits_open", "Models of a provider whose circuit is not closed", ["provider"]
)
LIMITED: Final = Gauge("tailrace_producer_gate_waiting", "Calls that wait for a limit of their provider", ["provider"])
LATE_USAGE: Final = Counter("tailrace_producer_late_usage", "Look-ups of usage after the end", ["provider", "outcome"])
