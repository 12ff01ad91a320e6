"""Run the commands with parsed arguments. Each returns the exit code."""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from types import FrameType
from typing import Any

import msgspec

from schemas.events import TERMINAL_TYPES
from services.standalone.api import Api
from services.standalone.errors import EXIT_CANCELLED, EXIT_FAILED, EXIT_OK, CommandFailed, Refused
from services.standalone.follow import Start, follow
from services.standalone.screen import Screen, exit_code
from services.standalone.tables import moment, print_table
from services.standalone.terminal import Terminal, pretty

__all__ = ["ask", "cancel", "delete_session", "sessions", "tail"]

_UNFINISHED = frozenset({"queued", "running", "cancelling"})


def ask(
    api: Api,
    terminal: Terminal,
    session: str | None,
    body: dict[str, Any],
    idempotency_key: str | None = None,
    *,
    as_json: bool,
) -> int:
    """Request a generation and show it to its end. Ctrl-C cancels it; a second Ctrl-C exits without waiting."""
    accepted = api.ask(session or f"ask-{secrets.token_hex(4)}", body, idempotency_key)
    start = Start(accepted.session, accepted.generation, accepted.cursor)
    screen = Screen(terminal, json=as_json)
    code = EXIT_FAILED
    with _cancelling(api.url, accepted.session, accepted.generation, terminal):
        for received in follow(api, start, terminal.remark):
            screen.show(received)
            if received.header.type in TERMINAL_TYPES:
                code = exit_code(received.header.type)
    return code


@contextmanager
def _cancelling(url: str, session: str, generation: str, terminal: Terminal) -> Iterator[None]:
    """Cancel the generation on the first Ctrl-C and read on to its end; raise KeyboardInterrupt on the second.

    The cancel request runs in a thread: an exception raised in a read would lose the connection and its last events.
    """
    pressed = False

    def request() -> None:
        try:
            with Api(url) as api:
                api.cancel(session, generation)
        except CommandFailed as error:
            terminal.complain(f"could not cancel: {error} (Ctrl-C again to exit)")

    def on_interrupt(_signum: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        threading.Thread(target=request, daemon=True).start()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tail(api: Api, terminal: Terminal, session: str, from_: str | None, after: str | None, *, as_json: bool) -> int:
    """Show a session until Ctrl-C; wait for a session that does not exist yet."""
    if after is None:
        try:
            api.session(session)
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                terminal.remark(f"there is no session {session} yet: waiting for its first event (Ctrl-C to exit)")
            elif error.status < HTTPStatus.INTERNAL_SERVER_ERROR:  # a server error may pass before `follow` gives up
                raise
    screen = Screen(terminal, json=as_json, headings=True)
    with _leaving(screen):
        for received in follow(api, Start(session, after=after, from_=from_), terminal.remark):
            screen.show(received)
    return EXIT_OK


@contextmanager
def _leaving(screen: Screen) -> Iterator[None]:
    """Exit the process at once on Ctrl-C.

    An exception from a signal handler may be lost in a library's destructor, or be handled as a broken connection. A
    reader that has nothing to clean up needs no exception.
    """

    def on_interrupt(_signum: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the signal interrupted a write: that line may be incomplete
            screen.close()
            sys.stdout.flush()
        os._exit(EXIT_CANCELLED)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def cancel(api: Api, terminal: Terminal, session: str, generation: str | None, *, as_json: bool) -> int:
    """Cancel one generation, or every unfinished generation of a session."""
    names = [generation] if generation else _unfinished(api.session(session))
    states = [api.cancel(session, name) for name in names]
    if as_json:
        terminal.show(msgspec.json.encode(states).decode())
        return EXIT_OK
    for state in states:
        terminal.show(f"{state.get('generation')}  {state.get('state')}")
    if not states:
        terminal.remark(f"no queued or running generations in {session}")
    return EXIT_OK


def _unfinished(session: dict[str, Any]) -> list[str]:
    return [str(g["generation"]) for g in session.get("generations", []) if g.get("state") in _UNFINISHED]


def delete_session(api: Api, terminal: Terminal, session: str, *, cancel: bool) -> int:
    """Delete a session permanently."""
    api.delete_session(session, cancel=cancel)
    terminal.remark(f"session {session} is deleted")
    return EXIT_OK


def sessions(api: Api, terminal: Terminal, limit: int, *, as_json: bool) -> int:
    """List sessions."""
    rows = api.sessions(limit)
    if as_json:
        terminal.show(pretty({"sessions": rows}))
    elif not rows:
        terminal.remark("no sessions yet")
    else:
        cells = [
            (r.get("session"), r.get("last_state"), r.get("generations"), r.get("model"), moment(r.get("updated_at")))
            for r in rows
        ]
        print_table(terminal, ["session", "state", "generations", "model", "updated"], cells)
    return EXIT_OK
