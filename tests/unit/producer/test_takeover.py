"""Test the calls of earlier producers, as read from the log of a generation."""

from schemas.codec import encode_event
from schemas.events import AbandonedCall, AnyEvent, Delta, Notice, Restarted, Started, UsageReported
from schemas.usage import Counted, Usage
from services.producer.core.takeover import Begun, lost_call

REQUEST = Counted(input=7, output=0, exact=True, encoding="o200k_base")
STARTED = Started(generation="g", seq=0, model="m", provider="p0", upstream_model="m0", counted=REQUEST)


def folded(*events: AnyEvent) -> Begun:
    begun = Begun()
    for seq, event in enumerate(events):
        event.seq = seq
        begun.take(encode_event(event), 10 + seq)
    return begun


def delta(tokens: int, epoch: int = 1) -> Delta:
    return Delta(generation="g", seq=0, epoch=epoch, text="x", tokens=tokens)


def test_a_call_with_tokens_is_lost_with_its_producer_and_counted_up_to_the_last_logged_token() -> None:
    call = lost_call(folded(STARTED, delta(4), delta(20)), REQUEST)
    assert call == AbandonedCall(
        number=1,
        code="producer_lost",
        provider="p0",
        upstream_model="m0",
        counted=Counted(input=7, output=20, encoding="o200k_base"),
    )


def test_a_generation_without_tokens_has_no_lost_call() -> None:
    assert lost_call(folded(STARTED), REQUEST) is None


def test_usage_before_a_missing_terminal_belongs_to_the_lost_call() -> None:
    told = UsageReported(generation="g", seq=0, usage=Usage(input=8, output=21), upstream_id="id-1")
    call = lost_call(folded(STARTED, delta(20), told), REQUEST)
    assert call is not None
    assert (call.usage, call.source, call.upstream_id) == (Usage(input=8, output=21), "stream", "id-1")


def test_call_numbers_continue_across_producers() -> None:
    first = AbandonedCall(number=1, code="upstream_cut_off")
    second = AbandonedCall(number=2, code="deadline_first_token")
    begun = folded(
        STARTED,
        delta(3),
        Restarted(generation="g", seq=0, epoch=2, reason="upstream_failed", provider="p0", call=first),
        Notice(generation="g", seq=0, epoch=2, code="failover", provider="p1", upstream_model="m1", call=second),
        delta(5, 2),
    )
    assert begun.abandoned == 2
    call = lost_call(begun, REQUEST)
    assert call is not None
    assert (call.number, call.provider, call.upstream_model, call.counted.output) == (3, "p1", "m1", 5)


def test_a_restart_without_a_call_still_counts_one_abandoned_call() -> None:
    begun = folded(STARTED, delta(3), Restarted(generation="g", seq=0, epoch=2, reason="producer_lost"), delta(4, 2))
    assert (begun.abandoned, begun.tokens) == (1, 4)
