"""Test the events that parts of a provider's stream become, without I/O."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from schemas.events import (
    Annotation,
    Binary,
    Cancelled,
    Completed,
    Delta,
    Extra,
    Failed,
    Signature,
    ToolCall,
    UsageReported,
)
from schemas.usage import Usage
from services.producer.core.counting import GenerationCounter
from services.producer.core.deadlines import Deadlines, overdue
from services.producer.core.generation import Generation
from services.producer.core.parts import (
    Alive,
    AnnotationPart,
    BinaryPart,
    End,
    ExtraPart,
    Finish,
    Identity,
    Part,
    Reasoning,
    Refusal,
    SignaturePart,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsageBegun,
    UsagePart,
)
from services.producer.core.registry import DeadlineOverrides
from services.producer.core.takeover import Begun, decide


def generation(next_seq: int = 0) -> Generation:
    return Generation(
        "g",
        epoch=1,
        next_seq=next_seq,
        counter=lambda: GenerationCounter("o200k_base", True),
        counted_input=3,
        exact=True,
        encoding="o200k_base",
    )


def test_neighbours_of_one_kind_and_choice_become_one_delta() -> None:
    run = generation()
    parts: list[Part] = [
        Text("Hel"),
        Alive(),
        Text("lo"),
        Text("!", choice=1),
        Reasoning("hm"),
        Reasoning("m"),
        Text("x"),
    ]
    deltas: list[Any] = run.absorb(parts, 1.0)
    assert [(d.text, d.reasoning, d.choice) for d in deltas] == [
        ("Hello", None, 0),
        ("!", None, 1),
        (None, "hmm", 0),
        ("x", None, 0),
    ]
    assert [d.seq for d in deltas] == [0, 1, 2, 3]
    assert [d.tokens for d in deltas] == sorted(d.tokens for d in deltas)


def test_tool_calls_and_bytes_are_events_of_their_own() -> None:
    call = ToolCall(index=0, id="c", name="f", arguments="{}")
    parts: list[Part] = [ToolCallPart(call), BinaryPart(Binary(media_type="image/png", data=b"1"))]
    deltas: list[Any] = generation().absorb(parts, 1.0)
    assert deltas[0].tool_call == call
    assert deltas[1].binary.data == b"1"


def test_parts_after_the_end_marker_are_ignored() -> None:
    run = generation()
    events = run.absorb([Text("a"), End(), Text("b")], 1.0)
    assert [e.text for e in events if isinstance(e, Delta)] == ["a"]
    assert isinstance(run.end(2.0)[-1], Completed)


def test_the_newest_usage_is_written_before_the_terminal() -> None:
    run = generation()
    run.absorb(
        [Identity("id-1", "m-1"), UsagePart(Usage(output=1)), UsagePart(Usage(output=2)), Finish("length"), End()], 1.0
    )
    usage, completed = run.end(2.0)
    assert isinstance(usage, UsageReported)
    assert (usage.usage.output, usage.upstream_id, usage.upstream_model, usage.seq) == (2, "id-1", "m-1", 0)
    assert isinstance(completed, Completed)
    assert (completed.finish_reason, completed.seq, completed.counted.input) == ("length", 1, 3)


def test_completed_has_the_finish_reasons_of_all_choices() -> None:
    run = generation()
    run.absorb([Finish("stop", 1), Finish("length", 0), End()], 1.0)
    completed = run.end(1.0)[-1]
    assert isinstance(completed, Completed)
    assert (completed.finish_reason, completed.finish_reasons) == ("length", ["length", "stop"])


def test_a_stream_without_its_end_marker_is_cut_off() -> None:
    run = generation()
    run.absorb([Text("a"), Finish("stop")], 1.0)
    failed = run.end(1.0)[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.recoverable, failed.counted.output) == ("upstream_cut_off", True, 1)


def test_failed_has_code_message_and_status_of_the_provider() -> None:
    run = generation()
    run.absorb([Text("a"), UpstreamFailure("upstream_overloaded", "busy", 529, True)], 1.0)
    failed = run.end(1.0)[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message, failed.upstream_status, failed.recoverable) == (
        "upstream_overloaded",
        "busy",
        529,
        True,
    )


def test_a_cancellation_reports_usage_received_before_it() -> None:
    run = generation()
    run.absorb([Text("a"), UsagePart(Usage(output=7))], 1.0)
    usage, cancelled = run.cancel("requested", 2.0)
    assert isinstance(usage, UsageReported)
    assert isinstance(cancelled, Cancelled)
    assert cancelled.reason == "requested"


BEGUN = UsageBegun(Usage(input=900, cached_input=800, output=1, raw={"input_tokens": 100}))


def test_an_unfinished_answer_reports_the_begun_input_and_the_counted_output() -> None:
    cancelled, failed, cut_off = (generation() for _ in range(3))
    for run in (cancelled, failed, cut_off):
        run.absorb([BEGUN, Text("rivers and turbines run on")], 1.0)
    failed.absorb([UpstreamFailure("upstream_overloaded", "busy")], 1.0)
    for usage, terminal in (cancelled.cancel("requested", 2.0), failed.end(2.0), cut_off.end(2.0)):
        assert isinstance(usage, UsageReported)
        assert usage.source == "begun"
        assert (usage.usage.input, usage.usage.cached_input) == (900, 800)
        assert isinstance(terminal, Cancelled | Failed)
        assert usage.usage.output == terminal.counted.output > 1
        assert (usage.seq, terminal.seq) == (1, 2)


def test_begun_usage_is_replaced_by_final_usage_and_kept_without_tokens() -> None:
    run = generation()
    run.absorb([BEGUN, Text("a"), UsagePart(Usage(input=901, output=7)), End()], 1.0)
    usage, _completed = run.end(2.0)
    assert isinstance(usage, UsageReported)
    assert (usage.usage.input, usage.usage.output, usage.source) == (901, 7, "stream")
    silent = generation()
    silent.absorb([BEGUN], 1.0)
    stated, cancelled = silent.cancel("requested", 2.0)
    assert isinstance(stated, UsageReported)
    assert isinstance(cancelled, Cancelled)
    assert (stated.usage.input, stated.usage.output, stated.source) == (900, 1, "begun")


BUSY = UpstreamFailure("upstream_overloaded", "busy", recoverable=True)


def test_an_abandoned_call_has_its_own_counts_and_resets_the_generation() -> None:
    run = generation()
    run.provider = "p"
    run.begin_answer()
    run.absorb([Identity("id-1", "m-1"), Text("rivers run"), UsagePart(Usage(input=3, output=9))], 1.0)
    first = run.abandon_call(BUSY)
    assert first is not None
    assert (first.number, first.code, first.provider, first.upstream_model) == (1, "upstream_overloaded", "p", "m-1")
    assert (first.upstream_id, first.usage, first.source) == ("id-1", Usage(input=3, output=9), "stream")
    assert (first.counted.input, first.counted.output, first.counted.exact) == (3, 3, True)
    run.begin_anew("upstream_failed", first, 2.0)
    run.begin_answer()
    run.absorb([Text("a"), End()], 3.0)
    (completed,) = run.end(4.0)
    assert isinstance(completed, Completed)
    assert completed.counted.output == 1


def test_a_call_with_only_its_input_reported_is_estimated_and_an_unstarted_call_is_free() -> None:
    run = generation()
    assert run.abandon_call(BUSY) is None
    run.begin_answer()
    run.absorb([BEGUN, Text("rivers and turbines")], 1.0)
    begun = run.abandon_call(BUSY)
    assert begun is not None
    assert begun.usage is not None
    assert (begun.number, begun.source, begun.usage.input) == (1, "begun", 900)
    assert begun.usage.output == begun.counted.output == 4
    run.begin_answer()
    silent = run.abandon_call(BUSY)
    assert silent is not None
    assert (silent.number, silent.usage, silent.source, silent.counted.output) == (2, None, "", 0)
    assert [type(event) for event in run.fail(BUSY, 2.0)] == [Failed], "nothing of them is taken for the last call's"


_parts = st.one_of(
    st.builds(Text, st.text(max_size=20), st.integers(0, 2)),
    st.builds(Reasoning, st.text(max_size=20)),
    st.just(Alive()),
    st.builds(Finish, st.just("stop")),
    st.builds(ToolCallPart, st.builds(ToolCall, index=st.integers(0, 3), arguments=st.text(max_size=9))),
)


@given(st.lists(st.lists(_parts, max_size=6), max_size=8))
def test_text_is_the_same_and_seqs_are_gapless_under_any_chunking(
    reads: list[list[Part]],
) -> None:
    run, whole = generation(), generation()
    events = [event for read in reads for event in run.absorb(read, 1.0)] + run.end(2.0)
    at_once = whole.absorb([part for read in reads for part in read], 1.0) + whole.end(2.0)
    assert [event.seq for event in events] == list(range(len(events)))
    for choice in range(3):
        assert _text(events, choice) == _text(at_once, choice)
    assert events[-1].counted == at_once[-1].counted  # type: ignore[union-attr]


def _text(events: list[Any], choice: int) -> str:
    return "".join(e.text or "" for e in events if isinstance(e, Delta) and e.choice == choice)


def test_each_deadline_has_its_own_code() -> None:
    limits = Deadlines(connect=1, first_token=2, between_tokens=3, total=10)
    assert overdue(limits, "connecting", now=1.5, begun=0, called=0, token=0) == "deadline_connect"
    assert overdue(limits, "waiting", now=1.5, begun=0, called=0, token=0) is None
    assert overdue(limits, "waiting", now=2.5, begun=0, called=0, token=0) == "deadline_first_token"
    assert overdue(limits, "streaming", now=2.5, begun=0, called=0, token=1) is None
    assert overdue(limits, "streaming", now=4.5, begun=0, called=0, token=1) == "deadline_between_tokens"
    assert overdue(limits, "streaming", now=10.5, begun=0, called=0, token=10) == "deadline_total"


def test_a_model_may_have_deadlines_of_its_own() -> None:
    own = Deadlines().overridden(DeadlineOverrides(total=5.0))
    assert (own.total, own.connect) == (5.0, Deadlines().connect)


def test_the_takeover_decision_depends_on_the_logged_events() -> None:
    begun = Begun()
    assert decide(begun, may_restart=False) == "run"
    begun.take(b'{"type":"started","generation":"g","seq":0}', 1)
    assert decide(begun, may_restart=False) == "restart"
    begun.take(b'{"type":"delta","generation":"g","seq":1,"text":"a","tokens":1}', 2)
    assert decide(begun, may_restart=False) == "interrupt"
    assert decide(begun, may_restart=True) == "restart"
    begun.take(b'{"type":"completed","generation":"g","seq":2,"finish_reason":"stop"}', 3)
    assert decide(begun, may_restart=True) == "done"


def test_a_log_with_an_expired_head_is_interrupted() -> None:
    begun = Begun.joining(1)
    begun.take(b'{"type":"notice","generation":"g","seq":7,"code":"upstream_retry"}', 11)
    assert decide(begun, may_restart=False) == "interrupt"


def test_a_repeated_function_name_counts_once_per_call() -> None:
    once, repeated = generation(), generation()
    arguments = ['{"city"', ': "', 'Bern"}']
    once.absorb([ToolCallPart(ToolCall(name="get_weather", arguments="".join(arguments))), End()], 1.0)
    parts: list[Part] = [ToolCallPart(ToolCall(id="a", name="get_weather", arguments=a)) for a in arguments]
    for part in parts:
        repeated.absorb([part], 1.0)
    assert repeated.counted().output == once.counted().output > 0


def test_the_names_of_two_calls_count_twice_and_again_after_a_restart() -> None:
    run = generation()
    calls: list[Part] = [ToolCallPart(ToolCall(index=n, name="get_weather", arguments="{}")) for n in (0, 1)]
    run.absorb(calls, 1.0)
    one = generation()
    one.absorb(calls[:1], 1.0)
    assert run.counted().output == 2 * one.counted().output
    run.begin_anew("upstream_failed", run.abandon_call(UpstreamFailure("upstream_cut_off", "cut off")), 2.0)
    run.absorb(calls[:1], 3.0)
    assert run.counted().output == one.counted().output


def test_every_kind_of_content_is_a_delta_of_its_own() -> None:
    parts: list[Part] = [
        Text("a"),
        Refusal("I can"),
        Refusal("not"),
        AnnotationPart(Annotation(kind="url_citation", url="https://h")),
        SignaturePart(Signature(kind="thinking", data="c2ln")),
        ExtraPart(Extra(kind="executed_tools", data=[1])),
        Text("b"),
    ]
    deltas: list[Any] = generation().absorb(parts, 1.0)
    assert [d.text or d.refusal or (d.annotation or d.signature or d.extra).kind for d in deltas] == [
        "a",
        "I cannot",
        "url_citation",
        "thinking",
        "executed_tools",
        "b",
    ]
    assert [d.tokens for d in deltas] == sorted(d.tokens for d in deltas)
