"""Errors of the command line and their exit codes."""

from typing import Final

__all__ = [
    "EXIT_CANCELLED",
    "EXIT_FAILED",
    "EXIT_OK",
    "EXIT_UNREACHABLE",
    "EXIT_USAGE",
    "CannotStart",
    "CommandFailed",
    "FolderInUse",
    "PortsTaken",
    "Refused",
    "StartFailed",
    "Unreachable",
]

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_CANCELLED: Final = 130


class CommandFailed(Exception):
    """A command failed; the text is for the person at the terminal."""

    exit_code = EXIT_FAILED


class CannotStart(CommandFailed):
    """``tailrace up`` cannot start until the environment is corrected; nothing was started."""

    exit_code = EXIT_USAGE


class PortsTaken(CannotStart):
    """Ports are in use or assigned twice; ``problems`` names each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(
            "cannot start, these ports are not free:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\nchoose other ports with the named options (0 means any free port)"
        )


class FolderInUse(CannotStart):
    """Another ``tailrace up`` holds the data folder; ``holder`` describes it, or is empty."""

    def __init__(self, folder: str, holder: str) -> None:
        self.folder = folder
        self.holder = holder
        super().__init__(
            f"the data folder {folder} is in use by another `tailrace up`{f' ({holder})' if holder else ''}: "
            "stop it, or choose another folder with --data"
        )


class StartFailed(CommandFailed):
    """A service ended or did not become ready during startup."""


class Unreachable(CommandFailed):
    """No service answers at the address, or reconnecting failed too often."""

    exit_code = EXIT_UNREACHABLE


class Refused(CommandFailed):
    """A service answered with a problem.

    ``status``: the HTTP status. ``kind``: the last segment of the problem's type.
    """

    def __init__(self, status: int, title: str, detail: str, kind: str = "") -> None:
        self.status = status
        self.kind = kind
        super().__init__(": ".join(part for part in (title or f"HTTP {status}", detail) if part))
