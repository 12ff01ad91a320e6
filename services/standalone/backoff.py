"""Compute the backoff of reconnects, and bound restarts. Pure."""

from typing import Final

__all__ = ["MAX_CRASHES", "reconnect_delay"]

MAX_CRASHES: Final = 6
"""A service that ends this often in a row, without a minute of health between, is given up."""


def reconnect_delay(failures: int, chance: float) -> float:
    """Return the seconds to wait after the given number (1, 2 …) of lost connections in a row.

    ``chance`` in 0…1, a random number, spreads the clients of a service that comes back.
    """
    return float(min(8.0, 0.2 * 2 ** (failures - 1)) * (0.5 + chance / 2))
