"""Test the declared streams and consumers of the broker."""

import pytest

from schemas.subjects import (
    Address,
    dead_subject,
    live_filter,
    log_filter,
    request_filter,
    request_subject,
    token_subject,
)
from schemas.topology import (
    CONSUMERS,
    COUNTERS,
    DEAD,
    DELIVERED,
    REQUESTS,
    Topology,
    billing_durable,
    producers_durable,
    service_durable,
    service_of,
    token_partition,
    token_stream,
)


def matches(pattern: str, subject: str) -> bool:
    """Whether a NATS filter of whole tokens and ``*`` covers a subject."""
    wanted, given = pattern.split("."), subject.split(".")
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


@pytest.mark.parametrize("partitions", [1, 4])
def test_there_is_one_log_for_each_partition_and_one_work_queue(partitions: int) -> None:
    streams = [s for s in Topology(partitions=partitions).streams() if not s.bucket]
    logs = [token_stream(p) for p in range(partitions)]
    assert [s.name for s in streams] == [*logs, REQUESTS, DEAD, DELIVERED, CONSUMERS, COUNTERS]
    assert [s.name for s in streams if s.work_queue] == [REQUESTS, CONSUMERS]


@pytest.mark.parametrize("session", [f"session-{n}" for n in range(8)])
def test_each_generation_is_stored_only_in_its_partition(session: str) -> None:
    address = Address.of("acme", session, "gen_1", 4)
    subject = token_subject(address)
    keeping = [s.name for s in Topology(partitions=4).streams() if any(matches(f, subject) for f in s.subjects)]
    assert keeping == [token_stream(address.partition)]
    assert matches(log_filter(address.partition, "acme", session), subject)


def test_stored_events_are_republished_under_the_same_names() -> None:
    for partition, stream in enumerate(Topology(partitions=3).streams()[:3]):
        assert stream.republish is not None
        source, destination = stream.republish
        assert (source,) == stream.subjects
        names = ("acme", "chat", "gen_1")
        for number, name in enumerate(names, 1):
            destination = destination.replace(f"{{{{wildcard({number})}}}}", name)
        assert destination == live_filter(partition, *names)


def test_at_most_one_request_of_a_generation_can_wait() -> None:
    requests = next(s for s in Topology().streams() if s.name == REQUESTS)
    assert requests.one_per_subject
    assert matches(requests.subjects[0], request_subject("default", "gen_1"))


def test_a_dead_request_is_stored_outside_the_queue() -> None:
    keeping = [
        s.name for s in Topology().streams() if any(matches(f, dead_subject("default", "g")) for f in s.subjects)
    ]
    assert keeping == [DEAD]


def test_the_pool_of_producers_shares_one_durable_consumer() -> None:
    consumer = Topology(pool="gpu", ack_wait=7.0).consumers()[0]
    assert (consumer.stream, consumer.durable, consumer.ack_wait) == (REQUESTS, producers_durable("gpu"), 7.0)
    assert consumer.filter == request_filter("gpu")
    assert matches(consumer.filter, request_subject("gpu", "gen_1"))
    assert not matches(consumer.filter, request_subject("default", "gen_1"))


def test_billing_reads_every_partition_with_a_durable_consumer() -> None:
    topology = Topology(partitions=3)
    billing = [c for c in topology.consumers() if c.durable.startswith("billing") and c.stream != DELIVERED]
    assert [(c.stream, c.durable) for c in billing] == [(token_stream(p), billing_durable(p)) for p in range(3)]
    assert [(c.filter,) for c in billing] == [s.subjects for s in topology.streams()[:3]]


def test_bounds_and_replicas_reach_every_log() -> None:
    topology = Topology(partitions=2, replicas=3, max_age=60.0, max_bytes=1_000)
    for stream in topology.streams()[:2]:
        assert (stream.replicas, stream.max_age, stream.max_bytes) == (3, 60.0, 1_000)


def test_logs_of_earlier_partitions_are_kept_and_billed() -> None:
    topology = Topology(partitions=2, kept=(1, 2, 5), replicas=3)
    assert topology.logs == (0, 1, 2, 5)
    assert {s.name: s.replicas for s in topology.streams() if s.name.startswith("TOKENS")} == {
        token_stream(p): 3 for p in (0, 1, 2, 5)
    }
    assert [c.stream for c in topology.consumers() if c.durable.startswith("billing") and c.stream != DELIVERED] == [
        token_stream(p) for p in (0, 1, 2, 5)
    ]


def test_only_streams_of_tokens_name_a_partition() -> None:
    assert [token_partition(name) for name in (token_stream(12), REQUESTS, "TOKENS_x", "KV_registry")] == [
        12,
        None,
        None,
        None,
    ]


def test_a_log_bounded_in_bytes_refuses_events_and_never_drops_those_of_a_running_answer() -> None:
    assert not Topology().streams()[0].refuses
    assert Topology(max_bytes=1_000).streams()[0].refuses


@pytest.mark.parametrize(("tenant", "name"), [("a", "b-c"), ("a-b", "c"), ("a", "b"), ("1-a", "b"), ("svc-1", "-")])
def test_tenant_and_name_are_parsed_from_the_durable_name_of_a_service(tenant: str, name: str) -> None:
    assert service_of(service_durable(tenant, name)) == (tenant, name)


def test_no_two_services_share_a_consumer() -> None:
    pairs = [("a", "b-c"), ("a-b", "c"), ("a-b-c", "d"), ("a", "b-c-d")]
    assert len({service_durable(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    "durable", ["billing-0", "producers-default", "svc-x-a-b", "svc-1-ab", "svc-9-a-b", "svc-1-a-"]
)
def test_consumers_of_another_kind_are_no_services(durable: str) -> None:
    assert service_of(durable) is None
