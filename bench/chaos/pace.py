"""Scale time limits by the load of a shared machine."""

import os
from typing import Final

__all__ = ["slow_for", "slowness"]

MOST: Final = 4.0
"""Upper bound of the factor: beyond it, a longer wait would not help."""
OWN: Final = 2.0
"""Runnable threads per core of a run itself."""


def slowness(load: float | None = None, cores: int | None = None) -> float:
    """Return the slowdown over a quiet machine, by the load of the last minute: 1 to 4."""
    load = os.getloadavg()[0] if load is None else load
    return min(MOST, max(1.0, load / (OWN * (cores or os.cpu_count() or 1))))


def slow_for(seconds: float) -> float:
    """Return ``seconds`` of a quiet machine, scaled to this machine's current load."""
    return seconds * slowness()
