"""Commands of ``tailrace keys``. Each function returns the exit code."""

from typing import Any

from services.kit.auth.api_keys import mint
from services.standalone.api import Api
from services.standalone.errors import EXIT_OK
from services.standalone.tables import moment, print_table
from services.standalone.terminal import Terminal, pretty

__all__ = ["bootstrap", "create", "list_", "revoke"]


def bootstrap(terminal: Terminal) -> int:
    """Create the operator's key; print it and the setting that enables it."""
    made = mint()
    terminal.remark("the operator's key, shown only once (set TAILRACE_KEY to it for this command line):")
    terminal.show(made.text)
    terminal.remark("its setting for delivery and billing:")
    terminal.show(f"TAILRACE_ADMIN_KEY_HASH={made.id}.{made.hash}")
    return EXIT_OK


def create(api: Api, terminal: Terminal, spec: dict[str, Any], *, as_json: bool) -> int:
    """Create a key and print it; its secret cannot be shown again."""
    made = api.create_key(spec)
    if as_json:
        terminal.show(pretty(made))
    else:
        terminal.remark(f"key {made.get('id')} of tenant {made.get('tenant')}, shown only once:")
        terminal.show(str(made.get("key")))
    if api.is_open():
        terminal.remark(
            "note: this service accepts callers without a key, so the key has no effect until credentials are required"
            " (TAILRACE_AUTH=required)"
        )
    return EXIT_OK


def list_(api: Api, terminal: Terminal, *, as_json: bool) -> int:
    """List keys, oldest first."""
    rows = api.keys()
    if as_json:
        terminal.show(pretty({"keys": rows}))
    elif not rows:
        terminal.remark("no API keys")
    else:
        columns = ["id", "tenant", "name", "scopes", "sessions", "created", "expires"]
        print_table(terminal, columns, [_cells(row) for row in rows])
    return EXIT_OK


def _cells(row: dict[str, Any]) -> list[object]:
    scopes, sessions = (" ".join(row.get(name) or ()) for name in ("scopes", "sessions"))
    ends = moment(row["expires_at"]) if row.get("expires_at") else "never"
    return [row.get("id"), row.get("tenant"), row.get("name"), scopes, sessions, moment(row.get("created_at")), ends]


def revoke(api: Api, terminal: Terminal, key: str) -> int:
    """Revoke a key everywhere."""
    api.revoke_key(key)
    terminal.remark(f"{key} is revoked")
    return EXIT_OK
