"""The ``tailrace`` command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import get_completion_class

from services.kit.auth.principal import SCOPES
from services.standalone import commands, dead, keys, money
from services.standalone.api import Api
from services.standalone.ask import ask
from services.standalone.consumers import consumers
from services.standalone.doctor import doctor
from services.standalone.errors import EXIT_CANCELLED, EXIT_OK, CommandFailed
from services.standalone.options import json_option, named, session_argument, url_option
from services.standalone.status import status
from services.standalone.terminal import Terminal

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])
PORT = click.IntRange(0, 65_535)
FOLDER = click.Path(path_type=Path, file_okay=False)


def _version() -> str:
    from importlib.metadata import version

    return version("tailrace")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tailrace", prog_name="tailrace")
def cli() -> None:
    """Ask models, and watch durable, resumable answers arrive.

    Exit codes: 0 completed, 1 failed, 2 wrong usage, 3 unreachable, 130 cancelled.
    """


_data = click.option("--data", type=FOLDER, envvar="TAILRACE_DATA", help="Folder for all data [.tailrace].")
_config = click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), envvar="TAILRACE_CONFIG", help="Settings as TOML."
)
_cluster = click.option(
    "--cluster",
    type=click.Choice(["1", "3", "5"]),
    envvar="TAILRACE_CLUSTER",
    default="1",
    show_default=True,
    help="nats-servers that keep copies of everything; their ports follow one another, their data lies apart.",
)


@cli.command()
@click.option("--port", type=PORT, help="Port of delivery and the page [8080].")
@click.option("--grpc-port", type=PORT, help="Port of gRPC [50051].")
@click.option("--billing-port", type=PORT, help="Port of billing [8081].")
@click.option("--producer-port", type=PORT, help="Port of the (first) producer [8082].")
@click.option("--nats-port", type=PORT, help="Port of the embedded nats-server [4222].")
@_data
@_config
@click.option(
    "--producers",
    type=click.IntRange(1, 32),
    envvar="TAILRACE_PRODUCERS",
    default=1,
    show_default=True,
    help="Producer processes; their ports follow one another.",
)
@_cluster
def up(data: Path | None, config: Path | None, producers: int, cluster: str, **flags: int | None) -> None:
    """Run everything here: broker, producer, delivery, billing and the page.

    Ctrl-C stops all of it; the data stays in its folder, and the next start goes on with it. A port of 0 takes any
    free one; ports without a flag are those of the settings (TAILRACE_DELIVERY_PORT and so on).
    """
    from services.standalone.up import UpOptions
    from services.standalone.up import up as run

    ports = {
        "delivery": flags["port"],
        "grpc": flags["grpc_port"],
        "billing": flags["billing_port"],
        "producer": flags["producer_port"],
        "nats": flags["nats_port"],
    }
    run(
        UpOptions(data=data, config=config, producers=producers, ports=ports, cluster=int(cluster)),
        _version(),
        Terminal(),
    )


@cli.command()
@session_argument
@click.option(
    "--from", "from_", type=click.Choice(["start", "live"]), help="Where to begin [the running or latest generation]."
)
@click.option("--after", metavar="CURSOR", help="Begin after this cursor.")
@json_option
@url_option
def tail(session: str, from_: str | None, after: str | None, as_json: bool, url: str) -> int:
    """Follow SESSION: what it holds and what is added, until Ctrl-C."""
    if from_ and after:
        raise click.UsageError("--from and --after exclude each other")
    with Api(url) as api:
        return commands.tail(api, Terminal(), session, from_, after, as_json=as_json)


@cli.command()
@session_argument
@click.argument("generation", callback=named("generation"), required=False)
@json_option
@url_option
def cancel(session: str, generation: str | None, as_json: bool, url: str) -> int:
    """Cancel GENERATION, or everything that is queued or running in SESSION."""
    with Api(url) as api:
        return commands.cancel(api, Terminal(), session, generation, as_json=as_json)


@cli.group(invoke_without_command=True)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
@url_option
@click.pass_context
def sessions(ctx: click.Context, limit: int, as_json: bool, url: str) -> int:
    """List sessions; or delete one."""
    if ctx.invoked_subcommand is not None:
        return 0
    with Api(url) as api:
        return commands.sessions(api, Terminal(), limit, as_json=as_json)


@sessions.command("delete")
@session_argument
@click.option("--yes", "sure", is_flag=True, help="Do not ask.")
@click.option("--cancel", "cancelled", is_flag=True, help="Cancel first what is queued or running in it.")
@url_option
def delete_session(session: str, sure: bool, cancelled: bool, url: str) -> int:
    """Delete SESSION: its events and records, for good. Bills stay."""
    if not sure and not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here: add --yes")
    if not sure:
        click.confirm(f"Delete session {session} for good?", abort=True, err=True)
    with Api(url) as api:
        return commands.delete_session(api, Terminal(), session, cancel=cancelled)


for _command in (ask, status, doctor, *money.COMMANDS):
    cli.add_command(_command)


@cli.group()
def requests() -> None:
    """Requests that no producer could run: look at them, send them again, remove them."""


_dead_one = click.argument("generation", callback=named("generation"))


@requests.command("dead")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
@url_option
def dead_(limit: int, as_json: bool, url: str) -> int:
    """List them, oldest first, each with the reason."""
    with Api(url) as api:
        return dead.dead(api, Terminal(), limit, as_json=as_json)


@requests.command()
@_dead_one
@url_option
def show(generation: str, url: str) -> int:
    """Show the whole request of GENERATION as JSON."""
    with Api(url) as api:
        return dead.show(api, Terminal(), generation)


@requests.command()
@_dead_one
@json_option
@url_option
def resend(generation: str, as_json: bool, url: str) -> int:
    """Send the request of GENERATION again, as a new generation of its session."""
    with Api(url) as api:
        return dead.resend(api, Terminal(), generation, as_json=as_json)


@requests.command()
@_dead_one
@url_option
def drop(generation: str, url: str) -> int:
    """Remove the request of GENERATION for good."""
    with Api(url) as api:
        return dead.drop(api, Terminal(), generation)


cli.add_command(consumers)


@cli.group("billing")
def billing_() -> None:
    """The ledger as a whole."""


@billing_.command()
@_data
@_config
@_cluster
def rebuild(data: Path | None, config: Path | None, cluster: str) -> int:
    """Fold the log of a folder anew into its ledger; what differs is corrected.

    Nothing else may run in the folder meanwhile. Elsewhere, with billing stopped, use python -m services.billing
    rebuild with billing's own settings.
    """
    from services.standalone.ports import PORTS
    from services.standalone.up import UpOptions
    from services.standalone.up import rebuild as run

    ports: dict[str, int | None] = dict.fromkeys(PORTS, 0)
    return run(UpOptions(data=data, config=config, producers=1, ports=ports, cluster=int(cluster)), Terminal())


@cli.group("keys")
def keys_() -> None:
    """API keys: make, list and revoke them.

    The variable TAILRACE_KEY holds the key or token that every command shows.
    """


@keys_.command()
def bootstrap() -> int:
    """Make the operator's key, and print it with the setting that lets it in."""
    return keys.bootstrap(Terminal())


@keys_.command()
@click.option("--name", default="", help="What it is for.")
@click.option(
    "--scope", "scopes", type=click.Choice(sorted(SCOPES)), multiple=True, required=True, help="What it may do; repeat."
)
@click.option("--session", "patterns", multiple=True, help="Pattern with * of its sessions; repeat [all of them].")
@click.option("--expires-in", type=click.FloatRange(min=1), metavar="SECONDS", help="When it ends [never].")
@click.option("--tenant", callback=named("tenant"), help="Whose it is; only the operator may say [your own].")
@json_option
@url_option
def create(
    *,
    name: str,
    scopes: tuple[str, ...],
    patterns: tuple[str, ...],
    expires_in: float | None,
    tenant: str | None,
    as_json: bool,
    url: str,
) -> int:
    """Make a key and print it; it cannot be seen again."""
    given = {"sessions": list(patterns), "expires_in": expires_in, "tenant": tenant}
    spec = {"name": name, "scopes": list(scopes)} | {field: value for field, value in given.items() if value}
    with Api(url) as api:
        return keys.create(api, Terminal(), spec, as_json=as_json)


@keys_.command("list")
@json_option
@url_option
def list_keys(as_json: bool, url: str) -> int:
    """List the keys of your tenant; the operator sees all."""
    with Api(url) as api:
        return keys.list_(api, Terminal(), as_json=as_json)


@keys_.command()
@click.argument("key", callback=named("key"))
@url_option
def revoke(key: str, url: str) -> int:
    """Revoke the key with the id KEY; streams that it has opened end."""
    with Api(url) as api:
        return keys.revoke(api, Terminal(), key)


@cli.group()
def topology() -> None:
    """Streams on the broker, and its users.

    The shared settings (TAILRACE_NATS_URL, TAILRACE_PARTITIONS, …) say which.
    """


@topology.command()
def apply() -> None:
    """Create or change what the services need, as a user who may."""
    from services.standalone.setup import apply_topology

    Terminal().show(apply_topology())


@topology.command("renew")
def renew_topology() -> None:
    """Begin a new era of all logs, after a store was put back from a copy: no cursor of before is taken."""
    from services.standalone.setup import renew

    Terminal().show(renew())


@topology.command()
def users() -> None:
    """Print nats-server configuration: one user a service, with exactly the subjects it needs."""
    from services.standalone.setup import users as render

    click.echo(render(), nl=False)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL; for bash: eval "$(tailrace completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "tailrace", "_TAILRACE_COMPLETE").source())


def main() -> None:
    """Run the command and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(prog_name="tailrace", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except CommandFailed as error:
        Terminal().complain(str(error))
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_CANCELLED
    sys.exit(code or EXIT_OK)


if __name__ == "__main__":
    main()
