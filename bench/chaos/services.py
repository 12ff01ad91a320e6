"""Check the services' guarantee: a durable consumer delivers every accepted event at least once, and no other. Pure."""

from collections import Counter
from collections.abc import Iterator

import msgspec

from bench.chaos.evidence import Evidence
from bench.chaos.violation import Violation

__all__ = ["check_services"]


def check_services(evidence: Evidence) -> Iterator[Violation]:
    """Check every durable consumer that was read to its end."""
    accepted = {e.data: name for name, told in evidence.told.items() for e in told.accepted}
    stored = {e.data for told in evidence.told.values() for e in told.stored}
    for consumer in sorted(evidence.served.keys() | evidence.worked.keys()):
        who = f"consumer {consumer}"
        served = evidence.served.get(consumer, [])
        for record in served:
            if record.data not in accepted:
                rule = "unaccepted" if record.data in stored else "not_in_log"
                yield Violation(rule, who, f"at {record.t:.2f} s: {record.data[:200]}")
                break
        given = {record.data for record in served}
        missing = Counter(name for data, name in accepted.items() if data not in given)
        if missing:
            name, count = missing.most_common(1)[0]
            example = next(d for d, n in accepted.items() if n == name and d not in given)
            detail = f"{missing.total()} events never given, {count} of {name}, such as {example[:120]}"
            yield Violation("unserved", who, detail)
        yield from _twice(who, [r.data for r in served if r.deliveries == 1])


def _twice(who: str, firsts: list[str]) -> Iterator[Violation]:
    """No event has two first deliveries."""
    counts = Counter(firsts)
    again = [data for data, count in counts.items() if count > 1]
    if again:
        event = msgspec.json.decode(again[0])
        place = f"{event['type']} {event.get('epoch', 1)}.{event['seq']} of {event['generation']}"
        yield Violation("new_twice", who, f"{len(again)} events were given as new more than once, such as {place}")
