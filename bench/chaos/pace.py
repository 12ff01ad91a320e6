"""How slow a machine is that others use too: waiting takes longer there, and is not given up sooner for that."""

import os
from typing import Final

__all__ = ["slow_for", "slowness"]

MOST: Final = 4.0
"""Beyond this nothing gets more time: who waits longer than that waits for something that does not come."""
OWN: Final = 2.0
"""Runnable threads a core that a run has by itself."""


def slowness(load: float | None = None, cores: int | None = None) -> float:
    """Return how many times longer things take than on a quiet machine, by the load of the last minute: 1 to 4."""
    load = os.getloadavg()[0] if load is None else load
    return min(MOST, max(1.0, load / (OWN * (cores or os.cpu_count() or 1))))


def slow_for(seconds: float) -> float:
    """Return what so many seconds of a quiet machine are on this one now."""
    return seconds * slowness()
