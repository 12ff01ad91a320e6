"""Declare the Prometheus metrics of delivery."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from services.kit.stages import stage

SUBSCRIBERS: Final = Gauge("tailrace_delivery_subscribers", "Connected subscribers", ["transport"])
FEEDS: Final = Gauge("tailrace_delivery_feeds", "Sessions that this replica follows")
FEED_BYTES: Final = Gauge("tailrace_delivery_feed_bytes", "Event bytes kept in memory by all feeds")
EVENTS_IN: Final = Counter("tailrace_delivery_events_received", "Events read from the log, by verdict", ["verdict"])
EVENTS_OUT: Final = Counter("tailrace_delivery_events_delivered", "Events handed to subscribers, each counted once")
WRITES: Final = Counter("tailrace_delivery_writes", "Writes to subscribers; one may hold many events")
BLOCKED: Final = Counter("tailrace_delivery_blocked_writes", "Writes that had to wait for a slow client")
REPLAYS: Final = Counter("tailrace_delivery_replays", "Subscribers that read from the log and not from memory")
CATCH_UP_READS: Final = Counter("tailrace_delivery_catch_up_reads", "Reads of the log for subscribers that caught up")
CATCH_UP_BYTES: Final = Gauge(
    "tailrace_delivery_catch_up_bytes", "Event bytes kept from catch-up reads, for other subscribers"
)
GAPS: Final = Counter(
    "tailrace_delivery_gaps", "Gaps in the feed, by whether a read of the log closed them", ["healed"]
)
CLOSED: Final = Counter("tailrace_delivery_streams_closed", "Ended streams by reason", ["reason"])
LOG_USED: Final = Gauge("tailrace_delivery_log_used_ratio", "Share of a log's byte limit that is used", ["partition"])
LOG_FULL: Final = Counter("tailrace_delivery_log_full", "Requests refused because the log that would keep them is full")
REQUESTS: Final = Counter("tailrace_delivery_requests_accepted", "Requests for generations put into the queue")
BUDGETS: Final = Counter("tailrace_delivery_budget_decisions", "Requests of tenants with budgets", ["decision"])
ADDED_LATENCY: Final = Histogram(
    "tailrace_delivery_latency_seconds",
    "From the producer's stamp to the hand-over to subscribers, one sample a batch",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CONSUMER_SESSIONS: Final = Gauge("tailrace_delivery_consumer_sessions", "Connections reading through durable consumers")
CONSUMER_EVENTS: Final = Counter(
    "tailrace_delivery_consumer_events", "Events delivered to durable consumers by the broker, by verdict", ["verdict"]
)
CONSUMER_READ_BACK: Final = Counter(
    "tailrace_delivery_consumer_read_back", "Events read from the log to judge delivered events"
)
CONSUMER_GIVEN: Final = Counter(
    "tailrace_delivery_consumer_given", "Events delivered to services, by whether redelivered", ["again"]
)
CONSUMER_DEAD: Final = Counter(
    "tailrace_delivery_consumer_dead", "Events that became dead events after too many deliveries"
)
CONSUMER_BLOCKED: Final = Counter(
    "tailrace_delivery_consumer_dead_refused", "Dead events that could not be stored: too many are kept"
)
CONSUMER_RESUMED: Final = Counter(
    "tailrace_delivery_consumer_resumed", "Durable consumers restarted where their log was cut off"
)
CONSUMER_SETTLED: Final = Counter("tailrace_delivery_consumer_settled", "Deliveries settled by services", ["how"])
GRPC_CALLS: Final = Counter(
    "tailrace_delivery_grpc_calls", "Ended gRPC calls, by method and status", ["method", "code"]
)
GRPC_REQUESTS: Final = Counter("tailrace_delivery_grpc_requests", "Client messages on gRPC streams, by kind", ["kind"])
SOCKETS: Final = Gauge("tailrace_delivery_sockets", "Open WebSockets")
SOCKETS_CLOSED: Final = Counter("tailrace_delivery_sockets_closed", "Ended WebSockets, by reason", ["reason"])
SOCKET_MESSAGES: Final = Counter(
    "tailrace_delivery_socket_messages", "Client messages on WebSockets, by kind", ["kind"]
)
SOCKET_THROTTLED: Final = Counter(
    "tailrace_delivery_socket_throttled", "Client messages on WebSockets delayed by the token bucket"
)
LIMITED: Final = Counter(
    "tailrace_delivery_limited",
    "Requests refused because of a limit, by limit and owner of the limit",
    ["limit", "whose"],
)
LIMITS_BLIND: Final = Counter(
    "tailrace_delivery_limits_blind",
    "Limit counts without an answer of the broker in time; this replica counted locally",
)
WITHDRAWN: Final = Counter(
    "tailrace_delivery_withdrawn",
    "Refused requests that the broker may have stored in part, by outcome",
    ["outcome"],
)
WORKERS: Final = Gauge("tailrace_delivery_workers", "Running worker processes")
WORKER_RESTARTS: Final = Counter("tailrace_delivery_worker_restarts", "Worker processes that ended unexpectedly")
DELIVERED_REPORTS: Final = Counter(
    "tailrace_delivery_delivered_reports", "Reports of delivered events of a generation, by outcome", ["outcome"]
)
ADMITTED: Final = stage("admitted")
NOTED: Final = stage("noted")
QUEUED: Final = stage("queued")
HEARD: Final = stage("heard")
