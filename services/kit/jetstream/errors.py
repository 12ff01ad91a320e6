"""Errors of the broker, and the mapping of nats-py's exceptions to them.

A caller distinguishes three cases: the broker is away (`BrokerUnavailable`: retry later), it has answered with a
refusal (`APIError`: the code is the reason), or the object does not exist (the method then returns ``None`` or
``False``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import nats.errors

__all__ = ["AWAY", "APIError", "BrokerUnavailable", "MessageTooLarge", "ReadFailed", "unavailable"]

AWAY: Final = (nats.errors.Error, OSError, TimeoutError)
"""nats-py's exceptions for a lost connection or a missing answer; its refusals are among them."""

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
"""In a cluster, while another append to the same subject is in progress."""


class BrokerUnavailable(Exception):
    """The broker cannot be reached or does not answer; a later retry may help."""


class ReadFailed(BrokerUnavailable):
    """A read of the log got no complete answer in time."""


class MessageTooLarge(BrokerUnavailable):
    """A message is larger than ``max_payload`` of the broker; only a change of that setting helps."""


class APIError(Exception):
    """JetStream refuses an append or a request to its API.

    ``code``: as in HTTP. ``err_code``: JetStream's own code of the refusal. ``description``: its text.
    """

    def __init__(self, code: int | None = None, err_code: int | None = None, description: str | None = None) -> None:
        self.code = code or 0
        self.err_code = err_code or 0
        self.description = description or ""
        super().__init__(f"the broker refuses: {self.description} ({self.err_code})")

    @property
    def is_temporary(self) -> bool:
        """Return whether the same request may succeed later: a server error, or too few servers for the replicas now.

        `CONSUMER_CREATE_FAILED` has a server error's code, but means a setting that the server cannot use.
        """
        return self.err_code == NO_PEERS or (self.code >= 500 and self.err_code != CONSUMER_CREATE_FAILED)

    @property
    def is_wrong_last_sequence(self) -> bool:
        """Return whether the subject's last message is another one than the append expected."""
        return self.err_code in (WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_CONSTANT)

    @property
    def is_subject_taken(self) -> bool:
        """Return whether the subject already has its only message (`JSStreamStoreFailed`, recognised by its text)."""
        return "per subject" in self.description

    @property
    def is_stream_full(self) -> bool:
        """Return whether the stream has its maximum of messages (`JSStreamStoreFailed`, recognised by its text)."""
        return "maximum messages" in self.description and not self.is_subject_taken

    @property
    def is_missing(self) -> bool:
        """Return whether the stream, consumer or message does not exist."""
        if self.err_code == MESSAGE_DELETE_FAILED:  # a server error, whatever the cause
            return self.description == "no message found"
        return self.code == 404 or self.err_code in (CONSUMER_NOT_FOUND, CONSUMER_DOES_NOT_EXIST)

    @property
    def is_existing(self) -> bool:
        """Return whether another consumer has this name."""
        return self.err_code in (CONSUMER_NAME_EXISTS, CONSUMER_ALREADY_EXISTS)

    @property
    def is_too_many(self) -> bool:
        """Return whether a limit of consumers or of storage is reached."""
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
