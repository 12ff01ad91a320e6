"""The guarantees, each as a function from the evidence of a run to its violations. Pure."""

import hashlib
import signal
from base64 import b32encode
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from bench.chaos.bills import check_bills
from bench.chaos.evidence import Evidence
from bench.chaos.money import check_money
from bench.chaos.readers import check_readers
from bench.chaos.schedule import Ask
from bench.chaos.services import check_services
from bench.chaos.told import Told
from bench.chaos.violation import Violation

__all__ = ["BOUND", "REST", "RULES", "check", "end_times"]

BOUND: Final = 15.0
"""Seconds, beyond the provider's own time and the lease, for a generation to end without faults (see `pace`)."""
REST: Final = 12.0
"""Seconds after a fault that count as disturbed: leaders are elected, processes start, refused requests wait."""
DRAIN_BOUND: Final = 10.0
STARTED: Final = 8.0
"""Seconds after its start in which a process may not handle SIGTERM yet."""
UNAVAILABLE: Final = 3
"""Exit code of a service that starts while the broker is unavailable."""


def check(evidence: Evidence) -> list[Violation]:
    """Return all violations, those of the log first."""
    return [violation for rule in RULES for violation in rule(evidence)]


def _ends(evidence: Evidence) -> Iterator[Violation]:
    """Every accepted request ended, with exactly one terminal."""
    for name, posted in evidence.posted.items():
        told = evidence.told.get(name)
        if told is None:
            yield Violation("lost", name, f"accepted at {posted.t:.1f} s, and nothing of it is in the log")
    for told in evidence.told.values():
        if len(told.terminals) != 1:
            types = [e.type for e in told.terminals]
            yield Violation("ends", told.generation, f"{len(types)} terminals {types}, {_tail(told)}")


def _silence(evidence: Evidence) -> Iterator[Violation]:
    """No writer continues after its own terminal, except for usage."""
    for told in evidence.told.values():
        for terminal in told.terminals:
            epoch, seq = terminal.place
            for entry in told.stored:
                if entry.place[0] >= epoch and entry.place[1] > seq and entry.type != "usage":
                    detail = f"{entry.type} {entry.place} at {entry.seq} after {terminal.type} {terminal.place}"
                    yield Violation("after_terminal", told.generation, detail)


def _writers(evidence: Evidence) -> Iterator[Violation]:
    """Messages with the same epoch and seq are byte-identical: at most one writer has an epoch."""
    for told in evidence.told.values():
        first: dict[tuple[int, int], str] = {}
        for entry in told.stored:
            if first.setdefault(entry.place, entry.data) != entry.data:
                detail = f"epoch and seq {entry.place} stand for {first[entry.place][:120]} and for {entry.data[:120]}"
                yield Violation("two_writers", told.generation, detail)
                break


def _texts(evidence: Evidence) -> Iterator[Violation]:
    """A completed answer is the whole text of one call at the provider; any other is the beginning of one."""
    for name, posted in evidence.posted.items():
        told = evidence.told.get(name)
        if told is None:
            continue
        completed = any(e.type == "completed" for e in told.terminals)
        calls = evidence.calls.get(posted.key, {}).values()
        if completed:
            good = any(call.how == "end" and call.text == told.text for call in calls)
        else:
            good = not told.text or any(call.text.startswith(told.text) for call in calls)
        if not good:
            sent = [f"{call.how}: {_short(call.text)}" for call in calls]
            yield Violation("text", name, f"the log says {_short(told.text)}; the provider sent {sent}")


def _cancels(evidence: Evidence) -> Iterator[Violation]:
    """No generation is cancelled without a request to cancel it, or its own rule about missing subscribers."""
    asks = evidence.opened.schedule.asks
    asked = {record.generation for record in evidence.cancels}
    asked |= {name for name, posted in evidence.posted.items() if asks[posted.ask].grace is not None}
    # Include refused requests: one that is withdrawn later may have run meanwhile, without subscribers.
    asked |= {_generation(ask) for ask in asks if ask.grace is not None}
    for told in evidence.told.values():
        if told.generation not in asked and any(e.type == "cancelled" for e in told.terminals):
            yield Violation("cancelled", told.generation, "nobody asked for that")


def _generation(ask: Ask) -> str:
    """Return the generation's name under this idempotency key, which is the same on every replica."""
    digest = hashlib.sha256(f"default\0{ask.session}\0{ask.key}".encode()).digest()
    return "gen_" + b32encode(digest)[:26].decode().lower()


def end_times(evidence: Evidence) -> dict[str, float]:
    """Return the seconds without faults that each accepted and ended generation took to end."""
    found: dict[str, float] = {}
    for name, posted in evidence.posted.items():
        told = evidence.told.get(name)
        if told is not None and told.terminals:
            end = told.terminals[0].event["at"] - evidence.opened.wall
            found[name] = evidence.undisturbed(posted.t, end, REST)
    return found


def _deadlines(evidence: Evidence) -> Iterator[Violation]:
    """Each generation ended in time: its own, twice where it ran twice, the lease, and a bound."""
    for name, took in end_times(evidence).items():
        posted, told = evidence.posted[name], evidence.told[name]
        allowed = posted.seconds * (1 + told.takeovers) + evidence.opened.lease + BOUND * evidence.slowness
        if took > allowed:
            yield Violation("deadline", name, f"ended after {took:.1f} s in which nothing was broken, of {allowed:.1f}")


def _processes(evidence: Evidence) -> Iterator[Violation]:
    """No process fails by itself, each stops after SIGTERM, and none exceeds its memory bound."""
    for record in evidence.exited:
        if not record.asked and record.code != UNAVAILABLE:
            yield Violation("crash", record.process, f"exit code {record.code} by itself: {record.output[-600:]}")
        untaught = record.code == -signal.SIGTERM and record.age < STARTED * evidence.slowness
        if record.asked and ((record.code != 0 and not untaught) or record.seconds > DRAIN_BOUND * evidence.slowness):
            yield Violation("drain", record.process, f"exit code {record.code} {record.seconds:.1f} s after SIGTERM")
    for memory in evidence.memory:
        bound = evidence.opened.memory.get(memory.process.partition("-")[0])
        if bound is not None and memory.peak > bound:
            yield Violation("memory", memory.process, f"{memory.peak >> 20} MB, of {bound >> 20}")


def _short(text: str) -> str:
    return repr(text if len(text) < 120 else f"{text[:60]} … {text[-50:]}") + f" ({len(text)} characters)"


def _tail(told: Told) -> str:
    last = [(e.type, e.place, e.seq) for e in told.stored[-4:]]
    return f"{len(told.accepted)} of {len(told.stored)} messages accepted, the last ones stored: {last}"


Rule = Callable[[Evidence], Iterable[Violation]]
RULES: Final[tuple[Rule, ...]] = (
    _ends,
    _silence,
    _writers,
    _texts,
    _cancels,
    check_readers,
    check_services,
    check_bills,
    check_money,
    _deadlines,
    _processes,
)
