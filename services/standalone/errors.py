"""What can go wrong on the command line, each with the exit code it ends with."""

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
    """A command cannot do what it was asked for; its text is for the person at the terminal."""

    exit_code = EXIT_FAILED


class CannotStart(CommandFailed):
    """Something must be changed before ``tailrace up`` can start; nothing has been started."""

    exit_code = EXIT_USAGE


class PortsTaken(CannotStart):
    """Ports are in use or given twice; ``problems`` names each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(
            "cannot start, these ports are not free:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\nchoose others with the options named (0 takes any free port)"
        )


class FolderInUse(CannotStart):
    """Another ``tailrace up`` works on the same data folder; ``holder`` says which, where known."""

    def __init__(self, folder: str, holder: str) -> None:
        self.folder = folder
        self.holder = holder
        super().__init__(
            f"the data folder {folder} is in use by another `tailrace up`{f' ({holder})' if holder else ''}: "
            "stop that one, or choose another folder with --data"
        )


class StartFailed(CommandFailed):
    """A service ended or did not become ready while everything was starting."""


class Unreachable(CommandFailed):
    """No service answers at the address, or the connection was lost for good."""

    exit_code = EXIT_UNREACHABLE


class Refused(CommandFailed):
    """A service answered with a problem.

    ``status`` is the HTTP status, ``kind`` the stable end of the problem's type.
    """

    def __init__(self, status: int, title: str, detail: str, kind: str = "") -> None:
        self.status = status
        self.kind = kind
        super().__init__(": ".join(part for part in (title or f"HTTP {status}", detail) if part))
