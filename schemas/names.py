"""Names that may stand in a NATS subject."""

import re

__all__ = ["InvalidName", "NAME_PATTERN", "check_name"]

NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class InvalidName(ValueError):
    """A tenant, session, generation or pool name that cannot be one token of a subject."""

    def __init__(self, role: str, value: object) -> None:
        self.role = role
        self.value = value
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        super().__init__(
            f"{role} name {shown} is not valid: use 1 to 64 characters out of letters, digits, '_' and '-'"
        )


def check_name(role: str, value: str) -> str:
    """Return ``value`` when it is safe as one subject token; ``role`` names it in the error.

    Raises:
        InvalidName: it is empty, too long, or has a character outside ``[A-Za-z0-9_-]``.
    """
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise InvalidName(role, value)
    return value
