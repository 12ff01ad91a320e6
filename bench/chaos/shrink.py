"""Find a smallest list of faults that still shows a violation (delta debugging, ddmin), in a bounded number of runs."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["shrink"]

T = TypeVar("T")


async def shrink(items: Sequence[T], shows: Callable[[list[T]], Awaitable[bool]], runs: int) -> list[T]:
    """Return a sublist of ``items`` for which ``shows`` held, after at most ``runs`` calls of it.

    ``shows`` is assumed to hold for ``items``. If it is not deterministic, the result is the smallest list for which it
    held once.
    """
    rest, parts = list(items), 1
    while rest and runs > 0:
        smaller: list[T] | None = None
        for candidate in _candidates(rest, parts):
            if runs <= 0:
                break
            runs -= 1
            if await shows(candidate):
                smaller = candidate
                break
        if smaller is not None:
            parts = max(2, min(parts - 1, len(smaller)))
            rest = smaller
        elif parts >= len(rest):
            break
        else:
            parts = min(len(rest), 2 * parts)
    return rest


def _candidates(items: list[T], parts: int) -> Iterator[list[T]]:
    """Yield each of the parts, then the items without each of them; for one part, only the empty list."""
    size = -(-len(items) // parts)
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    if parts > 1:
        yield from chunks
    if parts != 2:
        yield from ([x for other in chunks if other is not chunk for x in other] for chunk in chunks)
