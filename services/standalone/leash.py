"""Exec another program such that the kernel kills it when the process that started it dies.

Run as a file by a bare interpreter: ``python -I -S leash.py <pid of the starter> <program> <arguments…>``. Preparing
the child inside the starter would need Python code between fork and exec, which may deadlock; this program prepares
itself and then execs. It imports only the standard library, to start in milliseconds.
"""

import ctypes
import os
import signal
import sys

__all__ = ["command", "die_with"]

PR_SET_PDEATHSIG = 1


def command(argv: tuple[str, ...]) -> list[str]:
    """Return the command that runs ``argv`` so that it dies with the calling process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def die_with(starter: int) -> None:
    """Request SIGKILL from the kernel (Linux) when the starter dies; exit at once if it is dead already.

    SIGKILL instead of SIGTERM: with the starter gone, no process could enforce a grace period.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != starter:
        os._exit(1)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  # the argument vector comes from the supervisor
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
