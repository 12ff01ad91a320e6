"""Commands of ``tailrace requests``, which handles dead requests. Each function returns the exit code."""

from services.standalone.api import Api
from services.standalone.errors import EXIT_OK
from services.standalone.tables import moment, print_table
from services.standalone.terminal import Terminal, pretty, printable

__all__ = ["dead", "drop", "resend", "show"]


def dead(api: Api, terminal: Terminal, limit: int, *, as_json: bool) -> int:
    """List dead requests, oldest first."""
    rows = api.dead(limit)
    if as_json:
        terminal.show(pretty({"requests": rows}))
    elif not rows:
        terminal.remark("no dead requests")
    else:
        columns = ["generation", "session", "model", "died", "reason"]
        cells = [
            (r.get("generation"), r.get("session"), r.get("model"), moment(r.get("died_at")), _reason(r)) for r in rows
        ]
        print_table(terminal, columns, cells)
    return EXIT_OK


def _reason(row: dict[str, object]) -> str:
    reason = str(row.get("reason") or "")
    return reason if row.get("readable") else f"not readable: {reason}"


def show(api: Api, terminal: Terminal, generation: str) -> int:
    """Show a dead request with its content, as JSON."""
    text = pretty(api.dead_request(generation))
    terminal.show(printable(text) if terminal.is_interactive else text)
    return EXIT_OK


def resend(api: Api, terminal: Terminal, generation: str, *, as_json: bool) -> int:
    """Send a dead request again and show its new generation."""
    accepted = api.resend(generation)
    if as_json:
        terminal.show(pretty(accepted))
    else:
        terminal.show(f"{accepted.get('generation')}  {accepted.get('state')}  in session {accepted.get('session')}")
    return EXIT_OK


def drop(api: Api, terminal: Terminal, generation: str) -> int:
    """Remove a dead request permanently."""
    api.drop(generation)
    terminal.remark(f"{generation} is removed")
    return EXIT_OK
