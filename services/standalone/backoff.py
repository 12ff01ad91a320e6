"""Compute the backoff of reconnects, and bound restarts. Pure."""

from typing import Final

__all__ = ["MAX_CRASHES", "reconnect_delay"]

MAX_CRASHES: Final = 6
"""Crashes in a row, without a healthy minute between, after which a service is no longer restarted."""


def reconnect_delay(failures: int, chance: float) -> float:
    """Return the seconds to wait after the given number (1, 2 …) of lost connections in a row.

    ``chance``: a random number in 0…1; it spreads the clients that reconnect to a restarted service.
    """
    return float(min(8.0, 0.2 * 2 ** (failures - 1)) * (0.5 + chance / 2))
