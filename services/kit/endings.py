"""Why a service ends by itself."""

__all__ = ["CannotRun"]


class CannotRun(Exception):
    """What a service keeps or needs must be mended by a person first: starting it again would not help.

    The text says what is wrong and what to do.
    """
