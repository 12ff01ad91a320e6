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
    """Ask models, and follow durable, resumable answers.

    Exit codes: 0 completed, 1 failed, 2 wrong usage, 3 unreachable, 130 cancelled.
    """


_data = click.option("--data", type=FOLDER, envvar="TAILRACE_DATA", help="Data folder [.tailrace].")
_config = click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), envvar="TAILRACE_CONFIG", help="TOML file of settings."
)
_cluster = click.option(
    "--cluster",
    type=click.Choice(["1", "3", "5"]),
    envvar="TAILRACE_CLUSTER",
    default="1",
    show_default=True,
    help="Number of nats-servers, each with a copy of all data; their ports are consecutive, their folders separate.",
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
    help="Number of producer processes; their ports are consecutive.",
)
@_cluster
def up(data: Path | None, config: Path | None, producers: int, cluster: str, **flags: int | None) -> None:
    """Run all services on this machine: broker, producer, delivery, billing and the page.

    Ctrl-C stops them; the data is kept in its folder, and the next start continues with it. Port 0 means any free port;
    ports without a flag come from the settings (TAILRACE_DELIVERY_PORT and so on).
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
    "--from", "from_", type=click.Choice(["start", "live"]), help="Start position [the running or latest generation]."
)
@click.option("--after", metavar="CURSOR", help="Start after this cursor.")
@json_option
@url_option
def tail(session: str, from_: str | None, after: str | None, as_json: bool, url: str) -> int:
    """Follow SESSION, its stored events and new ones, until Ctrl-C."""
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
    """Cancel GENERATION, or all queued and running generations of SESSION."""
    with Api(url) as api:
        return commands.cancel(api, Terminal(), session, generation, as_json=as_json)


@cli.group(invoke_without_command=True)
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Largest number of sessions."
)
@json_option
@url_option
@click.pass_context
def sessions(ctx: click.Context, limit: int, as_json: bool, url: str) -> int:
    """List sessions, or delete one."""
    if ctx.invoked_subcommand is not None:
        return 0
    with Api(url) as api:
        return commands.sessions(api, Terminal(), limit, as_json=as_json)


@sessions.command("delete")
@session_argument
@click.option("--yes", "sure", is_flag=True, help="Do not ask for confirmation.")
@click.option("--cancel", "cancelled", is_flag=True, help="First cancel its queued and running generations.")
@url_option
def delete_session(session: str, sure: bool, cancelled: bool, url: str) -> int:
    """Delete SESSION, its events and records, permanently. Bills are kept."""
    if not sure and not sys.stdin.isatty():
        raise click.UsageError("standard input is not a terminal, so confirmation is not possible: add --yes")
    if not sure:
        click.confirm(f"Delete session {session} permanently?", abort=True, err=True)
    with Api(url) as api:
        return commands.delete_session(api, Terminal(), session, cancel=cancelled)


for _command in (ask, status, doctor, *money.COMMANDS):
    cli.add_command(_command)


@cli.group()
def requests() -> None:
    """Dead requests, which no producer could run: show, resend or remove them."""


_dead_one = click.argument("generation", callback=named("generation"))


@requests.command("dead")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Largest number of requests."
)
@json_option
@url_option
def dead_(limit: int, as_json: bool, url: str) -> int:
    """List dead requests, oldest first, with the reasons."""
    with Api(url) as api:
        return dead.dead(api, Terminal(), limit, as_json=as_json)


@requests.command()
@_dead_one
@url_option
def show(generation: str, url: str) -> int:
    """Show the request of GENERATION as JSON."""
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
    """Remove the request of GENERATION permanently."""
    with Api(url) as api:
        return dead.drop(api, Terminal(), generation)


cli.add_command(consumers)


@cli.group("billing")
def billing_() -> None:
    """Maintenance of the ledger."""


@billing_.command()
@_data
@_config
@_cluster
def rebuild(data: Path | None, config: Path | None, cluster: str) -> int:
    """Rebuild the ledger of a data folder from its log; correct differences.

    No other process may use the folder meanwhile. In other deployments stop billing and run python -m services.billing
    rebuild with billing's own settings.
    """
    from services.standalone.ports import PORTS
    from services.standalone.up import UpOptions
    from services.standalone.up import rebuild as run

    ports: dict[str, int | None] = dict.fromkeys(PORTS, 0)
    return run(UpOptions(data=data, config=config, producers=1, ports=ports, cluster=int(cluster)), Terminal())


@cli.group("keys")
def keys_() -> None:
    """Create, list and revoke API keys.

    Every command sends the key or token in the variable TAILRACE_KEY.
    """


@keys_.command()
def bootstrap() -> int:
    """Create the operator's key; print it with the setting that enables it."""
    return keys.bootstrap(Terminal())


@keys_.command()
@click.option("--name", default="", help="Purpose of the key.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(sorted(SCOPES)),
    multiple=True,
    required=True,
    help="Permission of the key; may be repeated.",
)
@click.option(
    "--session", "patterns", multiple=True, help="Sessions that it may access, a pattern with *; may be repeated [all]."
)
@click.option("--expires-in", type=click.FloatRange(min=1), metavar="SECONDS", help="Validity of the key [unlimited].")
@click.option("--tenant", callback=named("tenant"), help="Tenant of the key; only for the operator [your own].")
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
    """Create a key and print it; it cannot be shown again."""
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
    """Revoke the key with the id KEY; the streams opened with it end."""
    with Api(url) as api:
        return keys.revoke(api, Terminal(), key)


@cli.group()
def topology() -> None:
    """Streams and users of the broker.

    The shared settings (TAILRACE_NATS_URL, TAILRACE_PARTITIONS, …) determine them.
    """


@topology.command()
def apply() -> None:
    """Create or update the streams, consumers and buckets that the services need; needs a permitted broker user."""
    from services.standalone.setup import apply_topology

    Terminal().show(apply_topology())


@topology.command("renew")
def renew_topology() -> None:
    """Begin a new era of all logs, after a store was restored from a copy: earlier cursors become invalid."""
    from services.standalone.setup import renew

    Terminal().show(renew())


@topology.command()
def users() -> None:
    """Print nats-server configuration: one user per service, with exactly the subjects it needs."""
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
