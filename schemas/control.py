"""What a running generation can be told on its control subject; the producer answers `HEARD`, or `OVER`."""

from typing import Final

__all__ = ["CANCEL", "HEARD", "OVER", "OVER_BUDGET"]

CANCEL: Final = b"cancel"
"""Somebody who may wants it to end: it ends as ``cancelled``."""

OVER_BUDGET: Final = b"budget_exceeded"
"""A hard limit of whoever pays is reached: it ends as ``failed`` with the code ``budget_exceeded``."""

HEARD: Final = b"ok"

OVER: Final = b"over"
"""It had just ended."""
