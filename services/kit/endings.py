"""The error with which a service ends by itself."""

__all__ = ["CannotRun"]


class CannotRun(Exception):
    """The service's data or a dependency must be repaired by a person first: a restart would not help.

    The text names the problem and the remedy.
    """
