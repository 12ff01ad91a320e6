"""Become another program that the kernel kills when the process that started it dies.

Run as a file by a bare interpreter: ``python -I -S leash.py <pid of the starter> <program> <arguments…>``. A child that
is forked and prepared inside the starter would need Python code between fork and exec, which may deadlock; a program
that prepares itself and then execs does not. It imports nothing but the standard library, to start in milliseconds.
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
    """Ask the kernel (Linux) for SIGKILL when the starter dies; end at once if it has died already.

    SIGKILL rather than SIGTERM: the starter is gone, so nobody is left to wait or to insist.
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
