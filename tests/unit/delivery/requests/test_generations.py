"""Test that the existence of a generation is decided by the bucket's leader and the log."""

import msgspec
import pytest

from schemas.requests import GenerationRecord
from services.delivery.errors import Unknown
from services.delivery.requests.generations import Lookups
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import BrokerUnavailable, Stored

RECORD = GenerationRecord(
    tenant="t", session="s", generation="g", state="queued", model="scripted/story", created_at=1.0
)


class Bucketless:
    """A fake broker whose replicas are empty; ``leader`` is the entry or error of the bucket's leader."""

    def __init__(self, leader: Stored | BrokerUnavailable | None, log: Stored | None = None) -> None:
        self.leader = leader
        self.log = log

    async def last(self, stream: str, _filter: str) -> Stored | None:
        assert stream == "KV_generations"
        if isinstance(self.leader, BrokerUnavailable):
            raise self.leader
        return self.leader

    async def first(self, stream: str, _filter: str) -> Stored | None:
        assert stream == "TOKENS_0"
        return self.log


def lookups(leader: Stored | BrokerUnavailable | None, log: Stored | None = None) -> Lookups:
    async def partition_of(_tenant: str, _session: str) -> int:
        return 0

    return Lookups(Bucketless(leader, log), SystemClock(), partition_of)  # type: ignore[arg-type]


def stored(data: bytes) -> Stored:
    return Stored(7, "", data)


async def test_a_just_accepted_generation_exists_while_replicas_lag() -> None:
    found = lookups(stored(msgspec.json.encode(RECORD)))
    await found.require("t", "s", "g")
    assert await found.get("t", "s", "g") == (RECORD, 7)


async def test_a_generation_in_the_log_exists_without_the_bucket() -> None:
    await lookups(None, stored(b"{}")).require("t", "s", "g")
    await lookups(BrokerUnavailable("no leader"), stored(b"{}")).require("t", "s", "g")


async def test_a_generation_in_neither_bucket_nor_log_is_unknown() -> None:
    with pytest.raises(Unknown):
        await lookups(None).require("t", "s", "g")


async def test_an_unavailable_bucket_is_an_error_for_a_generation_not_in_the_log() -> None:
    with pytest.raises(BrokerUnavailable):
        await lookups(BrokerUnavailable("no leader")).require("t", "s", "g")


@pytest.mark.parametrize("data", [b"", b"not a record"])
async def test_a_forgotten_or_unreadable_record_is_none(data: bytes) -> None:
    assert await lookups(stored(data)).get("t", "s", "g") is None
