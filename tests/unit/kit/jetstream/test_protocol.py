"""Test the parsing of JetStream's subjects, statuses and errors, without a broker."""

from typing import Any

import msgspec
import pytest
from nats.errors import MaxPayloadError, NoServersError
from nats.js.errors import ServerError

from schemas.topology import Topology
from services.kit.jetstream import ack, api
from services.kit.jetstream.admin import NotReady, Refused, apply_topology
from services.kit.jetstream.client import parse_headers, parse_status
from services.kit.jetstream.errors import APIError, BrokerUnavailable, MessageTooLarge, unavailable
from services.kit.jetstream.pull import End, end_of

SHORT = b"$JS.ACK.TOKENS_0.d.1.2.3.4.5"
FORMS = [SHORT, b"$JS.ACK.hub.account.TOKENS_0.d.1.2.3.4.5", b"$JS.ACK.hub.account.TOKENS_0.d.1.2.3.4.5.token"]


@pytest.mark.parametrize("reply", FORMS)
def test_an_acknowledgement_subject_is_read_in_all_of_its_forms(reply: bytes) -> None:
    assert ack.delivered(reply) == ack.Delivered(deliveries=1, seq=2, consumer_seq=3)
    assert ack.stored_at(reply) == ack.StoredAt(seq=2, stamp=4, pending=5)


@pytest.mark.parametrize("reply", [b"", b"_INBOX.x", SHORT + b".6", b"$JS.ACK.TOKENS_0.d.1.2.3.4"])
def test_another_subject_is_no_acknowledgement_subject(reply: bytes) -> None:
    with pytest.raises(ValueError, match="no acknowledgement subject"):
        ack.delivered(reply)
    with pytest.raises(ValueError, match="no acknowledgement subject"):
        ack.stored_at(reply)


def test_an_acknowledgement_subject_is_composed_of_the_parsed_numbers() -> None:
    subject = ack.ack_subject("TOKENS_0", "d", ack.delivered(SHORT))
    assert subject == "$JS.ACK.TOKENS_0.d.1.2.3.0.0"
    assert ack.delivered(subject.encode()) == ack.delivered(SHORT)


def test_nak_has_its_delay_in_nanoseconds() -> None:
    assert ack.nak(0) == b"-NAK"
    assert ack.nak(1.5) == b'-NAK{"delay":1500000000}'
    assert ack.AT_ONCE == b'-NAK{"delay":1}'


@pytest.mark.parametrize(
    ("status", "end"),
    [
        ("404 No Messages", End.EMPTY),
        ("408 Request Timeout", End.EMPTY),
        ("409 Batch Completed", End.FULL),
        ("409 Message Size Exceeds MaxBytes", End.FULL),
        ("409 Consumer Deleted", End.GONE),
        ("409 Consumer is push based", End.GONE),
        ("503", End.GONE),
        ("503 No Responders", End.GONE),
        ("409 Exceeded MaxWaiting", End.REFUSED),
        ("409 Leadership Change", End.REFUSED),
        ("409 Server Shutdown", End.REFUSED),
        ("409 Exceeded MaxRequestBatch of 10", End.REFUSED),
        ("400 Bad Request", End.REFUSED),
        ("100 Idle Heartbeat", None),
    ],
)
def test_each_status_maps_to_one_end_of_a_pull(status: str, end: End | None) -> None:
    assert end_of(*parse_status(f"NATS/1.0 {status}\r\nNats-Pending-Messages: 1\r\n\r\n".encode())) is end


def test_raw_headers_are_read_as_the_library_reads_them() -> None:
    block = b"NATS/1.0\r\nTailrace-Reason: it: failed\r\nNats-Msg-Id:x\r\n\r\n"
    assert parse_headers(block) == {"Tailrace-Reason": "it: failed", "Nats-Msg-Id": "x"}
    assert parse_status(block) == ("", "")


@pytest.mark.parametrize("error", [NoServersError(), OSError("gone"), TimeoutError(), ServerError(code=500)])
def test_library_errors_become_broker_unavailable(error: Exception) -> None:
    with pytest.raises(BrokerUnavailable, match="cannot read") as raised, unavailable("cannot read"):
        raise error
    assert raised.value.__cause__ is error


def test_an_oversized_message_becomes_message_too_large() -> None:
    with pytest.raises(MessageTooLarge), unavailable("cannot store"):
        raise MaxPayloadError


def refusal(code: int, err_code: int, description: str = "no") -> bytes:
    return msgspec.json.encode({"error": {"code": code, "err_code": err_code, "description": description}})


class Answering:
    """A fake connection with one answer to all requests."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> bytes | None:
        return self.answer


async def test_an_answer_is_decoded_and_a_refusal_raised_with_its_codes() -> None:
    assert await api.ask(Answering(b'{"config":{"name":"error"}}'), "STREAM.INFO.X", dict[str, Any])
    with pytest.raises(APIError, match=r"no \(10071\)") as raised:
        await api.ask(Answering(refusal(400, 10071)), "STREAM.INFO.X", dict[str, Any])
    assert (raised.value.code, raised.value.err_code, raised.value.description) == (400, 10071, "no")


@pytest.mark.parametrize("answer", [None, b"", b"+OK", b'{"error":'])
async def test_an_unreadable_reply_is_broker_unavailable(answer: bytes | None) -> None:
    with pytest.raises(BrokerUnavailable, match=r"STREAM\.INFO\.X"):
        await api.ask(Answering(answer), "STREAM.INFO.X", dict[str, Any])


@pytest.mark.parametrize(
    ("error", "holds"),
    [
        (APIError(400, 10071), {"is_wrong_last_sequence"}),
        (APIError(400, 10164), {"is_wrong_last_sequence"}),
        (APIError(503, 10077, "maximum messages exceeded"), {"is_temporary", "is_stream_full"}),
        (APIError(503, 10077, "maximum messages per subject exceeded"), {"is_temporary", "is_subject_taken"}),
        (APIError(503, 10077, "maximum bytes exceeded"), {"is_temporary"}),
        (APIError(404, 10014), {"is_missing"}),
        (APIError(400, 10149), {"is_missing"}),
        (APIError(404, 10037), {"is_missing"}),
        (APIError(404, 10059), {"is_missing"}),
        (APIError(500, 10057, "no message found"), {"is_temporary", "is_missing"}),
        (APIError(500, 10057, "stream store EOF"), {"is_temporary"}),
        (APIError(400, 10013), {"is_existing"}),
        (APIError(400, 10148), {"is_existing"}),
        (APIError(400, 10026), {"is_too_many"}),
        (APIError(400, 10002), {"is_too_many"}),
        (APIError(400, 10005), {"is_temporary"}),
        (APIError(500, 10012), set()),
        (APIError(), set()),
    ],
)
def test_an_api_error_is_classified_for_the_caller(error: APIError, holds: set[str]) -> None:
    names = [name for name in vars(APIError) if name.startswith("is_")]
    assert {name for name in names if getattr(error, name)} == holds


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(500, 10074), Refused),
        (refusal(400, 10025), Refused),
        (refusal(503, 10008), NotReady),
        (refusal(400, 10005), NotReady),
        (refusal(400, 10058), NotReady),
        (refusal(500, 10012), NotReady),
        (None, NotReady),
    ],
)
async def test_setup_is_retried_only_after_recoverable_errors(answer: bytes | None, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        await apply_topology(Answering(answer), Topology(), wait=0)
