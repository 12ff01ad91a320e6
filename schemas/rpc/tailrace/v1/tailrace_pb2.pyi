from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Begin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BEGIN_UNSPECIFIED: _ClassVar[Begin]
    BEGIN_START: _ClassVar[Begin]
    BEGIN_LIVE: _ClassVar[Begin]
BEGIN_UNSPECIFIED: Begin
BEGIN_START: Begin
BEGIN_LIVE: Begin

class ReadRequest(_message.Message):
    __slots__ = ("session", "generation", "after", "begin", "granularity", "coalesce_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    COALESCE_MS_FIELD_NUMBER: _ClassVar[int]
    session: str
    generation: str
    after: str
    begin: Begin
    granularity: str
    coalesce_ms: int
    def __init__(self, session: _Optional[str] = ..., generation: _Optional[str] = ..., after: _Optional[str] = ..., begin: _Optional[_Union[Begin, str]] = ..., granularity: _Optional[str] = ..., coalesce_ms: _Optional[int] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("event", "gap", "bye")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    event: Event
    gap: Gap
    bye: Bye
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ..., gap: _Optional[_Union[Gap, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("reason", "generation")
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    reason: str
    generation: str
    def __init__(self, reason: _Optional[str] = ..., generation: _Optional[str] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ("reason", "cursor")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    reason: str
    cursor: str
    def __init__(self, reason: _Optional[str] = ..., cursor: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("generation", "seq", "epoch", "at", "type", "cursor", "started", "delta", "notice", "restarted", "usage", "completed", "failed", "cancelled", "interrupted", "json")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    RESTARTED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    INTERRUPTED_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    generation: str
    seq: int
    epoch: int
    at: float
    type: str
    cursor: str
    started: Started
    delta: Delta
    notice: Notice
    restarted: Restarted
    usage: UsageReported
    completed: Completed
    failed: Failed
    cancelled: Cancelled
    interrupted: Interrupted
    json: bytes
    def __init__(self, generation: _Optional[str] = ..., seq: _Optional[int] = ..., epoch: _Optional[int] = ..., at: _Optional[float] = ..., type: _Optional[str] = ..., cursor: _Optional[str] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., restarted: _Optional[_Union[Restarted, _Mapping]] = ..., usage: _Optional[_Union[UsageReported, _Mapping]] = ..., completed: _Optional[_Union[Completed, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., interrupted: _Optional[_Union[Interrupted, _Mapping]] = ..., json: _Optional[bytes] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("input", "output", "exact", "encoding")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    input: int
    output: int
    exact: bool
    encoding: str
    def __init__(self, input: _Optional[int] = ..., output: _Optional[int] = ..., exact: _Optional[bool] = ..., encoding: _Optional[str] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("model", "provider", "upstream_model", "counted", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    model: str
    provider: str
    upstream_model: str
    counted: Counted
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, model: _Optional[str] = ..., provider: _Optional[str] = ..., upstream_model: _Optional[str] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "reasoning", "tool_call", "binary", "refusal", "annotation", "signature", "extra", "choice", "tokens", "provider_at")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    BINARY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ANNOTATION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_AT_FIELD_NUMBER: _ClassVar[int]
    text: str
    reasoning: str
    tool_call: ToolCall
    binary: Binary
    refusal: str
    annotation: Annotation
    signature: Signature
    extra: Extra
    choice: int
    tokens: int
    provider_at: float
    def __init__(self, text: _Optional[str] = ..., reasoning: _Optional[str] = ..., tool_call: _Optional[_Union[ToolCall, _Mapping]] = ..., binary: _Optional[_Union[Binary, _Mapping]] = ..., refusal: _Optional[str] = ..., annotation: _Optional[_Union[Annotation, _Mapping]] = ..., signature: _Optional[_Union[Signature, _Mapping]] = ..., extra: _Optional[_Union[Extra, _Mapping]] = ..., choice: _Optional[int] = ..., tokens: _Optional[int] = ..., provider_at: _Optional[float] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("index", "id", "name", "arguments", "signature")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: str
    name: str
    arguments: str
    signature: str
    def __init__(self, index: _Optional[int] = ..., id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class Binary(_message.Message):
    __slots__ = ("media_type", "data", "continues")
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    media_type: str
    data: bytes
    continues: bool
    def __init__(self, media_type: _Optional[str] = ..., data: _Optional[bytes] = ..., continues: _Optional[bool] = ...) -> None: ...

class Annotation(_message.Message):
    __slots__ = ("kind", "url", "title", "quote", "start", "end", "number", "raw")
    KIND_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    QUOTE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    kind: str
    url: str
    title: str
    quote: str
    start: int
    end: int
    number: int
    raw: bytes
    def __init__(self, kind: _Optional[str] = ..., url: _Optional[str] = ..., title: _Optional[str] = ..., quote: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., number: _Optional[int] = ..., raw: _Optional[bytes] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("kind", "data", "details")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    data: str
    details: bytes
    def __init__(self, kind: _Optional[str] = ..., data: _Optional[str] = ..., details: _Optional[bytes] = ...) -> None: ...

class Extra(_message.Message):
    __slots__ = ("kind", "data")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    kind: str
    data: bytes
    def __init__(self, kind: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("code", "message", "attempt", "provider", "upstream_model", "delay", "call")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_MODEL_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    attempt: int
    provider: str
    upstream_model: str
    delay: float
    call: AbandonedCall
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., attempt: _Optional[int] = ..., provider: _Optional[str] = ..., upstream_model: _Optional[str] = ..., delay: _Optional[float] = ..., call: _Optional[_Union[AbandonedCall, _Mapping]] = ...) -> None: ...

class Restarted(_message.Message):
    __slots__ = ("reason", "provider", "upstream_model", "call")
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_MODEL_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    provider: str
    upstream_model: str
    call: AbandonedCall
    def __init__(self, reason: _Optional[str] = ..., provider: _Optional[str] = ..., upstream_model: _Optional[str] = ..., call: _Optional[_Union[AbandonedCall, _Mapping]] = ...) -> None: ...

class AbandonedCall(_message.Message):
    __slots__ = ("number", "code", "provider", "upstream_model", "upstream_id", "counted", "usage", "source")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_MODEL_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    number: int
    code: str
    provider: str
    upstream_model: str
    upstream_id: str
    counted: Counted
    usage: Usage
    source: str
    def __init__(self, number: _Optional[int] = ..., code: _Optional[str] = ..., provider: _Optional[str] = ..., upstream_model: _Optional[str] = ..., upstream_id: _Optional[str] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., source: _Optional[str] = ...) -> None: ...

class UsageReported(_message.Message):
    __slots__ = ("usage", "provider", "upstream_model", "upstream_id", "source", "call")
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_MODEL_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    usage: Usage
    provider: str
    upstream_model: str
    upstream_id: str
    source: str
    call: int
    def __init__(self, usage: _Optional[_Union[Usage, _Mapping]] = ..., provider: _Optional[str] = ..., upstream_model: _Optional[str] = ..., upstream_id: _Optional[str] = ..., source: _Optional[str] = ..., call: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("input", "output", "cached_input", "cache_write", "reasoning", "billed_input", "billed_output", "cost", "currency", "raw", "cache_write_1h", "reasons")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CACHED_INPUT_FIELD_NUMBER: _ClassVar[int]
    CACHE_WRITE_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    BILLED_INPUT_FIELD_NUMBER: _ClassVar[int]
    BILLED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    CACHE_WRITE_1H_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    input: int
    output: int
    cached_input: int
    cache_write: int
    reasoning: int
    billed_input: int
    billed_output: int
    cost: str
    currency: str
    raw: bytes
    cache_write_1h: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, input: _Optional[int] = ..., output: _Optional[int] = ..., cached_input: _Optional[int] = ..., cache_write: _Optional[int] = ..., reasoning: _Optional[int] = ..., billed_input: _Optional[int] = ..., billed_output: _Optional[int] = ..., cost: _Optional[str] = ..., currency: _Optional[str] = ..., raw: _Optional[bytes] = ..., cache_write_1h: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class Completed(_message.Message):
    __slots__ = ("finish_reason", "finish_reasons", "counted")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    finish_reasons: _containers.RepeatedScalarFieldContainer[str]
    counted: Counted
    def __init__(self, finish_reason: _Optional[str] = ..., finish_reasons: _Optional[_Iterable[str]] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "upstream_status", "recoverable", "counted")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_STATUS_FIELD_NUMBER: _ClassVar[int]
    RECOVERABLE_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    upstream_status: int
    recoverable: bool
    counted: Counted
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., upstream_status: _Optional[int] = ..., recoverable: _Optional[bool] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("reason", "counted")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    counted: Counted
    def __init__(self, reason: _Optional[str] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ...) -> None: ...

class Interrupted(_message.Message):
    __slots__ = ("reason", "counted")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    counted: Counted
    def __init__(self, reason: _Optional[str] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("id", "subscribe", "credit", "ack", "unsubscribe", "start", "cancel")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    UNSUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    id: str
    subscribe: Subscribe
    credit: Credit
    ack: Ack
    unsubscribe: Unsubscribe
    start: StartRequest
    cancel: CancelRequest
    def __init__(self, id: _Optional[str] = ..., subscribe: _Optional[_Union[Subscribe, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., unsubscribe: _Optional[_Union[Unsubscribe, _Mapping]] = ..., start: _Optional[_Union[StartRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ...) -> None: ...

class Subscribe(_message.Message):
    __slots__ = ("read", "credit", "auto_window")
    READ_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    AUTO_WINDOW_FIELD_NUMBER: _ClassVar[int]
    read: ReadRequest
    credit: Credit
    auto_window: bool
    def __init__(self, read: _Optional[_Union[ReadRequest, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., auto_window: _Optional[bool] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("events", "bytes")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    events: int
    bytes: int
    def __init__(self, events: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("cursor",)
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    def __init__(self, cursor: _Optional[str] = ...) -> None: ...

class Unsubscribe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("id", "read", "subscribed", "ended", "start", "cancel", "problem")
    ID_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    id: str
    read: ReadResponse
    subscribed: Subscribed
    ended: Ended
    start: StartResponse
    cancel: CancelResponse
    problem: Problem
    def __init__(self, id: _Optional[str] = ..., read: _Optional[_Union[ReadResponse, _Mapping]] = ..., subscribed: _Optional[_Union[Subscribed, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., start: _Optional[_Union[StartResponse, _Mapping]] = ..., cancel: _Optional[_Union[CancelResponse, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class Subscribed(_message.Message):
    __slots__ = ("cursor",)
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    def __init__(self, cursor: _Optional[str] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("status", "type", "detail", "retry_after")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    status: int
    type: str
    detail: str
    retry_after: int
    def __init__(self, status: _Optional[int] = ..., type: _Optional[str] = ..., detail: _Optional[str] = ..., retry_after: _Optional[int] = ...) -> None: ...

class ConsumeRequest(_message.Message):
    __slots__ = ("open", "settle", "credit", "stop")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    open: OpenConsumer
    settle: Settle
    credit: ConsumerCredit
    stop: StopConsuming
    def __init__(self, open: _Optional[_Union[OpenConsumer, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ..., credit: _Optional[_Union[ConsumerCredit, _Mapping]] = ..., stop: _Optional[_Union[StopConsuming, _Mapping]] = ...) -> None: ...

class StopConsuming(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenConsumer(_message.Message):
    __slots__ = ("consumer", "window", "auto_ack")
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    AUTO_ACK_FIELD_NUMBER: _ClassVar[int]
    consumer: str
    window: int
    auto_ack: bool
    def __init__(self, consumer: _Optional[str] = ..., window: _Optional[int] = ..., auto_ack: _Optional[bool] = ...) -> None: ...

class ConsumerCredit(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: int
    def __init__(self, events: _Optional[int] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("id", "acks", "nacks", "working", "delay")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACKS_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    id: str
    acks: _containers.RepeatedScalarFieldContainer[str]
    nacks: _containers.RepeatedScalarFieldContainer[str]
    working: _containers.RepeatedScalarFieldContainer[str]
    delay: float
    def __init__(self, id: _Optional[str] = ..., acks: _Optional[_Iterable[str]] = ..., nacks: _Optional[_Iterable[str]] = ..., working: _Optional[_Iterable[str]] = ..., delay: _Optional[float] = ...) -> None: ...

class ConsumeResponse(_message.Message):
    __slots__ = ("consuming", "deliveries", "settled", "refused", "stopped")
    CONSUMING_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    consuming: Consuming
    deliveries: Deliveries
    settled: Settled
    refused: Refused
    stopped: Stopped
    def __init__(self, consuming: _Optional[_Union[Consuming, _Mapping]] = ..., deliveries: _Optional[_Union[Deliveries, _Mapping]] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., stopped: _Optional[_Union[Stopped, _Mapping]] = ...) -> None: ...

class Consuming(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Deliveries(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[ConsumerEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[ConsumerEvent, _Mapping]]] = ...) -> None: ...

class ConsumerEvent(_message.Message):
    __slots__ = ("token", "session", "deliveries", "gap", "event")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    token: str
    session: str
    deliveries: int
    gap: str
    event: Event
    def __init__(self, token: _Optional[str] = ..., session: _Optional[str] = ..., deliveries: _Optional[int] = ..., gap: _Optional[str] = ..., event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class Settled(_message.Message):
    __slots__ = ("id", "settled", "unknown")
    ID_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    id: str
    settled: int
    unknown: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., settled: _Optional[int] = ..., unknown: _Optional[_Iterable[str]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("id", "problem")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    id: str
    problem: Problem
    def __init__(self, id: _Optional[str] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class Stopped(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StartRequest(_message.Message):
    __slots__ = ("session", "idempotency_key", "model", "messages", "metadata", "options", "follow")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    session: str
    idempotency_key: str
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    metadata: _containers.ScalarMap[str, str]
    options: bytes
    follow: Subscribe
    def __init__(self, session: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., options: _Optional[bytes] = ..., follow: _Optional[_Union[Subscribe, _Mapping]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content", "json")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    json: bytes
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., json: _Optional[bytes] = ...) -> None: ...

class StartResponse(_message.Message):
    __slots__ = ("session", "generation", "cursor", "state", "repeated")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    session: str
    generation: str
    cursor: str
    state: str
    repeated: bool
    def __init__(self, session: _Optional[str] = ..., generation: _Optional[str] = ..., cursor: _Optional[str] = ..., state: _Optional[str] = ..., repeated: _Optional[bool] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("session", "generation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    session: str
    generation: str
    def __init__(self, session: _Optional[str] = ..., generation: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("generation", "state")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    generation: str
    state: str
    def __init__(self, generation: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class GetGenerationRequest(_message.Message):
    __slots__ = ("session", "generation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    session: str
    generation: str
    def __init__(self, session: _Optional[str] = ..., generation: _Optional[str] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("session", "generation", "state", "text", "reasoning", "finish_reason", "refusal", "json")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    session: str
    generation: str
    state: str
    text: str
    reasoning: str
    finish_reason: str
    refusal: str
    json: bytes
    def __init__(self, session: _Optional[str] = ..., generation: _Optional[str] = ..., state: _Optional[str] = ..., text: _Optional[str] = ..., reasoning: _Optional[str] = ..., finish_reason: _Optional[str] = ..., refusal: _Optional[str] = ..., json: _Optional[bytes] = ...) -> None: ...
