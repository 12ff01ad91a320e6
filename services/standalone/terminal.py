"""Write to the terminal, with colours only when it is interactive."""

import os
import sys
from contextlib import suppress
from typing import Final, TextIO

import click
import msgspec

__all__ = ["Terminal", "pretty", "printable"]

_CONTROLS: Final = {code: "�" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return ``text`` without control characters, so that an answer cannot control the terminal."""
    return text.translate(_CONTROLS)


def pretty(document: object) -> str:
    """Return a document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


class Terminal:
    """Write results to standard output and remarks to standard error.

    Colours are off with ``NO_COLOR`` and on a stream that is not a terminal.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.is_interactive = self.out.isatty()
        coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.is_coloured = coloured and self.out.isatty()
        self._colour_err = coloured and self.err.isatty()

    def write(self, text: str) -> None:
        """Write a piece of an answer and flush: unchanged to a pipe or file, printable to a terminal."""
        self.out.write(printable(text) if self.is_interactive else text)
        self.out.flush()

    def aside(self, text: str) -> None:
        """Write text that is not part of the answer: inline and dim on a terminal, otherwise to standard error."""
        stream, colour = (self.out, self.is_coloured) if self.is_interactive else (self.err, self._colour_err)
        stream.write(click.style(printable(text), dim=True) if colour else printable(text))
        stream.flush()

    def show(self, line: str) -> None:
        """Print a line of the result."""
        self.out.write(line + "\n")
        self.out.flush()

    def remark(self, line: str) -> None:
        """Print a status line on standard error; ignore write errors."""
        line = printable(line)
        with suppress(OSError):  # standard error may be a file on a full disk
            self.err.write((click.style(line, dim=True) if self._colour_err else line) + "\n")
            self.err.flush()

    def complain(self, line: str) -> None:
        """Print an error on standard error."""
        label = click.style("error:", fg="red", bold=True) if self._colour_err else "error:"
        self.err.write(f"{label} {printable(line)}\n")
        self.err.flush()

    def bold(self, text: str) -> str:
        """Return ``text`` in bold if the output has colours."""
        return click.style(text, bold=True) if self.is_coloured else text

    def dim(self, text: str) -> str:
        """Return ``text`` dimmed if the output has colours."""
        return click.style(text, dim=True) if self.is_coloured else text
