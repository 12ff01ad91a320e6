"""Arguments and options shared by several commands."""

from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from schemas.names import InvalidName, check_name
from services.standalone.api import Api
from services.standalone.errors import CommandFailed

__all__ = ["complete_session", "data_option", "json_option", "named", "pairs_of", "session_argument", "url_option"]

url_option = click.option(
    "--url", envvar="TAILRACE_URL", default="http://127.0.0.1:8080", show_default=True, help="Address of delivery."
)
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="TAILRACE_DATA",
    default=".tailrace",
    show_default=True,
    help="Data folder of `tailrace up`.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def complete_session(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete session names from delivery's list; return none when delivery does not answer."""
    try:
        with Api(ctx.params.get("url") or "http://127.0.0.1:8080") as api:
            names = [str(row.get("session")) for row in api.sessions(100)]
    except CommandFailed:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def named(role: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """Return a click callback that validates a name; the error text calls it ``role``."""

    def check(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
        try:
            return value if value is None else check_name(role, value)
        except InvalidName as error:
            raise click.BadParameter(str(error)) from error

    return check


def pairs_of(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse a repeated option ``NAME=VALUE``."""
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        if name in pairs:
            raise click.BadParameter(f"{name!r} is given twice")
        pairs[name] = text
    return pairs


session_argument = click.argument("session", callback=named("session"), shell_complete=complete_session)
