"""Errors of the broker, and the mapping of nats-py's exceptions to them.

A caller tells three cases apart: the broker is away (`BrokerUnavailable`: ask again later), it has answered and refuses
(`APIError`: the code says why), or there is nothing (a method then returns ``None`` or ``False``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import nats.errors

__all__ = ["AWAY", "APIError", "BrokerUnavailable", "MessageTooLarge", "ReadFailed", "unavailable"]

AWAY: Final = (nats.errors.Error, OSError, TimeoutError)
"""What nats-py raises when the connection is down or closed, or no answer comes; its refusals are among them."""

# Error codes of JetStream's API (`err_code`), from nats-server's `server/errors.json`.
RESOURCES_EXCEEDED: Final = 10002
NO_PEERS: Final = 10005
CONSUMER_CREATE_FAILED: Final = 10012
CONSUMER_NAME_EXISTS: Final = 10013
CONSUMER_NOT_FOUND: Final = 10014
CONSUMER_LIMIT: Final = 10026
MESSAGE_DELETE_FAILED: Final = 10057
STREAM_NAME_EXISTS: Final = 10058
WRONG_LAST_SEQUENCE: Final = 10071
REPLICAS_NOT_SUPPORTED: Final = 10074
CONSUMER_ALREADY_EXISTS: Final = 10148
CONSUMER_DOES_NOT_EXIST: Final = 10149
WRONG_LAST_SEQUENCE_CONSTANT: Final = 10164
"""In a cluster, while another append to the same subject is on its way."""


class BrokerUnavailable(Exception):
    """The broker cannot be reached or does not answer; asking again later may help."""


class ReadFailed(BrokerUnavailable):
    """A read of the log got no complete answer within its time."""


class MessageTooLarge(BrokerUnavailable):
    """A message is larger than ``max_payload`` of the broker; it takes it only after a change of its settings."""


class APIError(Exception):
    """JetStream refuses an append or a request to its API.

    ``code``: as in HTTP. ``err_code``: JetStream's own, which tells refusals apart. ``description``: its text.
    """

    def __init__(self, code: int | None = None, err_code: int | None = None, description: str | None = None) -> None:
        self.code = code or 0
        self.err_code = err_code or 0
        self.description = description or ""
        super().__init__(f"the broker refuses: {self.description} ({self.err_code})")

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may be taken later: a server error, or too few servers for the replicas now.

        `CONSUMER_CREATE_FAILED` is a server error and yet none: the server says so of a setting that it cannot use.
        """
        return self.err_code == NO_PEERS or (self.code >= 500 and self.err_code != CONSUMER_CREATE_FAILED)

    @property
    def is_wrong_last_sequence(self) -> bool:
        """Whether another message has been stored under the subject since the one that the append expected."""
        return self.err_code in (WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_CONSTANT)

    @property
    def is_subject_taken(self) -> bool:
        """Whether the stream keeps one message a subject and has it (`JSStreamStoreFailed`, told by its text alone)."""
        return "per subject" in self.description

    @property
    def is_stream_full(self) -> bool:
        """Whether the stream holds as many messages as it may (`JSStreamStoreFailed`, told by its text alone)."""
        return "maximum messages" in self.description and not self.is_subject_taken

    @property
    def is_missing(self) -> bool:
        """Whether there is no such stream, consumer or message."""
        if self.err_code == MESSAGE_DELETE_FAILED:  # a server error, whatever has failed
            return self.description == "no message found"
        return self.code == 404 or self.err_code in (CONSUMER_NOT_FOUND, CONSUMER_DOES_NOT_EXIST)

    @property
    def is_existing(self) -> bool:
        """Whether there is another consumer of this name."""
        return self.err_code in (CONSUMER_NAME_EXISTS, CONSUMER_ALREADY_EXISTS)

    @property
    def is_too_many(self) -> bool:
        """Whether a bound of consumers or of storage is reached."""
        return self.err_code in (CONSUMER_LIMIT, RESOURCES_EXCEEDED)


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Map nats-py's exceptions in the block to `BrokerUnavailable`, keeping the cause; ``what`` begins its text.

    Raises:
        MessageTooLarge: for a message that nats-py refuses to send.
    """
    try:
        yield
    except nats.errors.MaxPayloadError as error:
        raise MessageTooLarge(f"{what}: {error!r}") from error
    except AWAY as error:
        raise BrokerUnavailable(f"{what}: {error!r}") from error
