"""Parse the broker's timestamps."""

import re
from datetime import datetime
from typing import Final

__all__ = ["nanoseconds"]

_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")


def nanoseconds(text: str) -> int:
    """Convert the broker's timestamp (RFC 3339, up to nanoseconds) to nanoseconds since 1970; 0 for none."""
    match = _TIME.fullmatch(text)
    if match is None:
        return 0
    moment, fraction, zone = match.groups()
    try:
        whole = int(datetime.fromisoformat(moment + zone.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return 0
    return max(0, whole * 1_000_000_000 + int((fraction or "").ljust(9, "0")))
