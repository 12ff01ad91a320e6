"""Validate names: tokens of NATS subjects, and names shown to people."""

import re

__all__ = ["ControlCharacter", "InvalidName", "NAME_PATTERN", "check_name", "check_readable"]

NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class InvalidName(ValueError):
    """A tenant, session, generation or pool name that is not a valid subject token."""

    def __init__(self, role: str, value: object) -> None:
        self.role = role
        self.value = value
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        super().__init__(
            f"{role} name {shown} is not valid: use 1 to 64 characters out of letters, digits, '_' and '-'"
        )


def check_name(role: str, value: str) -> str:
    """Return ``value`` if it is a valid subject token; ``role`` names it in the error.

    Raises:
        InvalidName: ``value`` is empty, too long, or has a character outside ``[A-Za-z0-9_-]``.
    """
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise InvalidName(role, value)
    return value


class ControlCharacter(ValueError):
    """A name shown in terminals, logs and tables contains a control character or a line separator."""

    def __init__(self, role: str, value: str, character: str) -> None:
        self.role = role
        self.value = value
        super().__init__(f"{role} {value[:80]!r} contains the control character U+{ord(character):04X}: remove it")


def check_readable(role: str, value: str) -> str:
    """Return ``value`` if it has no control characters; ``role`` names it in the error.

    Raises:
        ControlCharacter: ``value`` has one.
    """
    found = _CONTROL.search(value)
    if found is not None:
        raise ControlCharacter(role, value, found[0])
    return value
