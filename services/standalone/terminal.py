"""The terminal: where text goes, with colours only where somebody watches."""

import os
import sys
from contextlib import suppress
from typing import Final, TextIO

import click
import msgspec

__all__ = ["Terminal", "pretty", "printable"]

_CONTROLS: Final = {code: "�" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return ``text`` without control characters, so that no answer can steer the terminal it is shown on."""
    return text.translate(_CONTROLS)


def pretty(document: object) -> str:
    """Return a document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


class Terminal:
    """Standard output for results and standard error for remarks.

    ``NO_COLOR`` switches colours off; a stream that is no terminal never gets any.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.is_interactive = self.out.isatty()
        coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.is_coloured = coloured and self.out.isatty()
        self._colour_err = coloured and self.err.isatty()

    def write(self, text: str) -> None:
        """Write a piece of an answer at once: unchanged into a pipe or file, printable on a terminal."""
        self.out.write(printable(text) if self.is_interactive else text)
        self.out.flush()

    def aside(self, text: str) -> None:
        """Write a piece of text that is not the answer: dim, inline on a terminal, otherwise on standard error."""
        stream, colour = (self.out, self.is_coloured) if self.is_interactive else (self.err, self._colour_err)
        stream.write(click.style(printable(text), dim=True) if colour else printable(text))
        stream.flush()

    def show(self, line: str) -> None:
        """Print a line of the result."""
        self.out.write(line + "\n")
        self.out.flush()

    def remark(self, line: str) -> None:
        """Print a line about what happens, on standard error; one that it does not take is no reason to stop."""
        line = printable(line)
        with suppress(OSError):  # a file on a full disk
            self.err.write((click.style(line, dim=True) if self._colour_err else line) + "\n")
            self.err.flush()

    def complain(self, line: str) -> None:
        """Print what went wrong, on standard error."""
        label = click.style("error:", fg="red", bold=True) if self._colour_err else "error:"
        self.err.write(f"{label} {printable(line)}\n")
        self.err.flush()

    def bold(self, text: str) -> str:
        """Return ``text`` bold where the output has colours."""
        return click.style(text, bold=True) if self.is_coloured else text

    def dim(self, text: str) -> str:
        """Return ``text`` dim where the output has colours."""
        return click.style(text, dim=True) if self.is_coloured else text
