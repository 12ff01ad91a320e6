"""Control messages for a running generation; the producer answers `HEARD`, or `OVER`."""

from typing import Final

__all__ = ["CANCEL", "HEARD", "OVER", "OVER_BUDGET"]

CANCEL: Final = b"cancel"
"""Cancel the generation: it ends as ``cancelled``."""

OVER_BUDGET: Final = b"budget_exceeded"
"""A budget's hard limit is reached: the generation ends as ``failed`` with the code ``budget_exceeded``."""

HEARD: Final = b"ok"

OVER: Final = b"over"
"""The generation had already ended."""
