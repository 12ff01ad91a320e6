"""Define the client's and server's WebSocket messages, and encode them in JSON or MessagePack, without I/O."""

from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

__all__ = [
    "JSON",
    "MSGPACK",
    "SUBPROTOCOLS",
    "Ack",
    "Accepted",
    "Bye",
    "Cancel",
    "Cancelling",
    "ClientMessage",
    "Consume",
    "Consuming",
    "Credit",
    "CreditBody",
    "Deliveries",
    "Dialect",
    "EventCredit",
    "End",
    "Error",
    "Gap",
    "Ping",
    "Pong",
    "RequestId",
    "Settle",
    "Settled",
    "StartGeneration",
    "Stopped",
    "Subscribe",
    "Subscribed",
    "Unconsume",
    "Unreadable",
    "Unsubscribe",
]

JSON: Final = "tailrace.v1.json"
MSGPACK: Final = "tailrace.v1.msgpack"
SUBPROTOCOLS: Final = (JSON, MSGPACK)

RequestId = Annotated[str, msgspec.Meta(max_length=100)] | Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Amount = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=200)]  # its characters are checked where it is used


Tokens = Annotated[list[str], msgspec.Meta(max_length=1_000)]


class CreditBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Credit in events and bytes; an omitted one is not limited."""

    events: Amount | None = None
    bytes: Amount | None = None


class ClientMessage(msgspec.Struct, tag_field="type", kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of client messages. ``id``: chosen by the client and repeated in the answer."""

    id: RequestId | None = None


class Subscribe(ClientMessage, tag="subscribe"):
    """Read a session, or one generation of it; everything up to ``coalesce`` as in the query of server-sent events.

    ``credit``: what may be sent at first; ``window``: ``auto`` follows the client's acknowledgements instead.
    """

    session: Name
    generation: Name | None = None
    after: Name | None = None
    from_: Name | None = msgspec.field(default=None, name="from")
    granularity: Name | None = None
    coalesce: int | None = None
    credit: CreditBody | None = None
    window: Literal["auto"] | None = None


class Credit(ClientMessage, tag="credit"):
    """Grant credit to a session, or to a durable consumer, for which only events are counted."""

    session: Name | None = None
    consumer: Name | None = None
    events: Amount | None = None
    bytes: Amount | None = None


class Ack(ClientMessage, tag="ack"):
    """Acknowledge all events up to the cursor."""

    session: Name
    cursor: Name


class Unsubscribe(ClientMessage, tag="unsubscribe"):
    """End a subscription of a session."""

    session: Name


class EventCredit(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Credit in events."""

    events: Amount


class Consume(ClientMessage, tag="consume"):
    """Read through a durable consumer. ``ack``: ``auto`` acknowledges written events. ``credit``: initial credit."""

    consumer: Name
    ack: Literal["explicit", "auto"] = "explicit"
    credit: EventCredit | None = None


class Settle(ClientMessage, tag="settle"):
    """Settle deliveries by their tokens, as over HTTP."""

    consumer: Name
    acks: Tokens = []
    nacks: Tokens = []
    working: Tokens = []
    delay: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 0.0


class Unconsume(ClientMessage, tag="unconsume"):
    """Stop reading through a durable consumer."""

    consumer: Name


class StartSubscription(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the generation that a `StartGeneration` starts is read; fields as of `Subscribe`."""

    granularity: Name | None = None
    coalesce: int | None = None
    credit: CreditBody | None = None
    window: Literal["auto"] | None = None


class StartGeneration(ClientMessage, tag="start"):
    """Start a generation. ``request``: the body as over HTTP. ``subscribe``: also read it, from its first event."""

    session: Name
    request: Any
    idempotency_key: str | None = None
    subscribe: StartSubscription | None = None


class Cancel(ClientMessage, tag="cancel"):
    """Cancel a generation."""

    session: Name
    generation: Name


class Ping(ClientMessage, tag="ping"):
    """Check that the peer is alive; the server sends it too, with a number as ``id``."""


class Pong(ClientMessage, tag="pong"):
    """Answer to a ping, with its ``id``."""


class _ServerMessage(msgspec.Struct, tag_field="type", kw_only=True, omit_defaults=True):
    id: RequestId | None = None


class Subscribed(_ServerMessage, tag="subscribed"):
    """A subscription begins. ``cursor``: it reads after this cursor."""

    session: str
    cursor: str


class Gap(_ServerMessage, tag="gap"):
    """Events of ``generation``, or of the session, are missing."""

    session: str
    reason: str
    generation: str | None = None


class Bye(_ServerMessage, tag="bye"):
    """A subscription ends, and can be resumed after ``cursor``."""

    session: str
    reason: str
    cursor: str


class End(_ServerMessage, tag="end"):
    """A subscription has ended: ``complete``, ``gap`` or ``unsubscribed``."""

    session: str
    reason: str
    generation: str | None = None


class Accepted(_ServerMessage, tag="accepted"):
    """A request has been queued. ``repeated``: it had already been queued under the same key."""

    session: str
    generation: str
    cursor: str
    state: str
    repeated: bool = False


class Cancelling(_ServerMessage, tag="cancelling"):
    """Result of a cancellation: ``cancelling``, or the generation's terminal state."""

    session: str
    generation: str
    state: str


class Consuming(_ServerMessage, tag="consuming"):
    """Reading through a durable consumer begins."""

    consumer: str


class Deliveries(_ServerMessage, tag="deliveries"):
    """Events of a durable consumer, each with its delivery fields."""

    consumer: str
    events: list[msgspec.Raw]


class Settled(_ServerMessage, tag="settled"):
    """Number of tokens that the broker has accepted, and the unknown tokens."""

    consumer: str
    settled: int
    unknown: list[str]


class Stopped(_ServerMessage, tag="stopped"):
    """Reading through a durable consumer over this socket has ended."""

    consumer: str
    reason: str


class Error(_ServerMessage, tag="error"):
    """Refusal of a client message, as problem details. ``retry_after``: seconds, where a retry may help."""

    problem: Any
    session: str | None = None
    consumer: str | None = None
    retry_after: int | None = None


_Said = Subscribe | Credit | Ack | Unsubscribe | StartGeneration | Cancel | Consume | Settle | Unconsume | Ping | Pong
_KINDS: Final = ", ".join(str(kind.__struct_config__.tag) for kind in _Said.__args__)
_REFUSALS: Final = (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError)


class _Labels(msgspec.Struct):
    """Readable fields of an invalid message."""

    id: Any = None
    type: Any = None
    session: Any = None


class Unreadable(NamedTuple):
    """An invalid message. ``slug``: its error, as the stable end of a problem's type."""

    slug: str
    detail: str
    id: RequestId | None = None


class Dialect:
    """Encode and decode messages of one subprotocol. ``text``: messages use text frames."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = name == JSON
        codec = msgspec.json if self.text else msgspec.msgpack
        self._decoder: Any = codec.Decoder(_Said)
        self._labels: Any = codec.Decoder(_Labels)
        self._encoder: Any = codec.Encoder()

    def encode(self, message: msgspec.Struct) -> bytes:
        """Encode a message."""
        data: bytes = self._encoder.encode(message)
        return data

    def decode(self, data: str | bytes) -> Any:
        """Decode a client message, or return an `Unreadable`; never raises."""
        if isinstance(data, str) != self.text:
            frames = "text frames with JSON" if self.text else "binary frames with MessagePack"
            return Unreadable("wrong-frame", f"{self.name} is spoken in {frames}")
        try:
            return self._decoder.decode(data)
        except _REFUSALS as error:
            return self._explain(data, error)

    def _explain(self, data: str | bytes, error: Exception) -> Unreadable:
        try:
            labels: _Labels = self._labels.decode(data)
        except _REFUSALS:
            notation = "JSON" if self.text else "MessagePack"
            return Unreadable("unreadable-message", f"the message is no {notation} object: {error}")
        id_ = labels.id if type(labels.id) in (str, int) and len(str(labels.id)) <= 100 else None
        if f"Invalid value {labels.type!r}" in str(error) or not isinstance(labels.type, str):
            shown = repr(labels.type)[:40]
            return Unreadable("unknown-type", f"type {shown} is not one of: {_KINDS}", id_)
        return Unreadable("bad-message", str(error), id_)
