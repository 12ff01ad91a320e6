"""Run ``tailrace up`` and ``tailrace billing rebuild``: resolve the options, then start and stop the processes."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from services.kit.private_files import UMASK
from services.kit.settings import SettingsError, read_config
from services.standalone.embedded import NatsBinary, find_nats_server, payload_for, render_config, render_node
from services.standalone.errors import EXIT_FAILED, CannotStart
from services.standalone.folder import locked
from services.standalone.plan import NATS, Addresses, Options, ServiceSpec, node_files, plan_services, summary
from services.standalone.ports import WantedPort, read_ports, settle_ports
from services.standalone.settings_check import overruled, wrong_settings
from services.standalone.setup import begin_new_eras
from services.standalone.storage_watch import StorageWatch
from services.standalone.store import drop_indexes, running_mark, set_aside_unreadable
from services.standalone.supervisor import Supervisor
from services.standalone.terminal import Terminal

__all__ = ["UpOptions", "rebuild", "up", "wanted_body"]

DEFAULT_DATA: Final = ".tailrace"


class UpOptions:
    """Hold the flags of ``tailrace up``; ``None`` means the variable, the file or the default."""

    def __init__(
        self,
        *,
        data: Path | None,
        config: Path | None,
        producers: int,
        ports: dict[str, int | None],
        cluster: int = 1,
    ) -> None:
        self.data = data
        self.config = config.absolute() if config else None
        self.producers = producers
        self.cluster = cluster
        self.ports = ports


class _Prepared(NamedTuple):
    """The plan of a run in a locked data folder."""

    options: Options
    specs: list[ServiceSpec]
    binary: NatsBinary
    env: dict[str, str]
    config: dict[str, Any]


def up(up_options: UpOptions, version: str, terminal: Terminal) -> None:
    """Run all services until a signal stops them.

    Raises:
        CannotStart: a port, the folder, the configuration or nats-server is not usable; nothing was started.
        CommandFailed: a service did not start or could not be kept running; everything has been stopped.
    """
    with _prepared(up_options, terminal) as ready:
        head = terminal.bold(f"Tailrace {version} is running")
        rows = summary(ready.options, ready.binary.version_text, ready.env, ready.config)
        asyncio.run(_run(ready, terminal, lambda: _announce(terminal, head, rows)))


def rebuild(up_options: UpOptions, terminal: Terminal) -> int:
    """Rebuild the ledger of a data folder from its log, with only the brokers running; return the exit code.

    Raises:
        CannotStart: the folder is in use, or it, the configuration or nats-server is not usable.
        CommandFailed: the broker did not start.
    """
    with _prepared(up_options, terminal) as ready:
        return asyncio.run(_rebuild(ready, terminal))


@contextmanager
def _prepared(up_options: UpOptions, terminal: Terminal) -> Iterator[_Prepared]:
    env = dict(os.environ) | ({"TAILRACE_CONFIG": str(up_options.config)} if up_options.config else {})
    try:
        config = read_config(env)
    except SettingsError as error:
        raise CannotStart(str(error)) from error
    problems: list[str] = []
    ports = read_ports(up_options.ports, env, config, problems)
    problems += wrong_settings(env)
    if problems:
        raise CannotStart(str(SettingsError(problems)))
    for line in overruled(env, config):
        terminal.remark(line)
    binary = find_nats_server()
    data = Path(up_options.data or _section(config, "shared").get("data") or DEFAULT_DATA).expanduser().absolute()
    os.umask(UMASK)  # inherited by nats-server, which writes its store
    with locked(data, terminal.remark) as describe:
        describe(f"process {os.getpid()}")
        options = _resolve_options(up_options, data, ports)
        try:
            _write_node_files(options, payload_for(wanted_body(env, config)))
        except OSError as error:
            raise CannotStart(f"cannot write to the data folder {data}: {error.strerror}") from error
        describe(f"process {os.getpid()}, {Addresses.of(options).page}")
        yield _Prepared(options, plan_services(options, env, config, str(binary.path)), binary, env, config)


def wanted_body(env: Mapping[str, str], config: dict[str, Any]) -> int:
    """Return the largest request body in bytes, or 0 for an unset or invalid value, which delivery reports."""
    value = env.get("TAILRACE_DELIVERY_MAX_BODY") or _section(config, "delivery").get("max_body")
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        return 0


def _write_node_files(options: Options, max_payload: int) -> None:
    for number, path in enumerate(node_files(options).values(), start=1):
        if options.node_ports:
            port = (options.nats_port, *options.node_ports)[number - 1]
            text = render_node(number, port, path.with_suffix(""), options.route_ports, max_payload)
        else:
            text = render_config(options.nats_port, path.with_suffix(""), max_payload)
        path.write_text(text, encoding="utf-8")


async def _run(ready: _Prepared, terminal: Terminal, on_ready: Callable[[], None]) -> None:
    specs, data = ready.specs, ready.options.data
    brokers = [spec.name for spec in specs if spec.start_phase == 0]
    supervisor = Supervisor(specs, data / "logs", terminal.remark, _store_repair(data, terminal))
    supervisor.stop_on_signals()
    terminal.remark(f"starting (data in {data})")

    async def restart() -> None:
        await supervisor.restart(brokers)

    watched = [spec.ready for spec in specs if spec.name not in brokers]
    watch = StorageWatch(watched, data, restart, terminal.remark)
    with running_mark(data) as has_gone_down:

        async def begin_eras() -> None:
            if has_gone_down:
                terminal.remark("the machine crashed during the last run: the logs begin a new era")
                await begin_new_eras(Addresses.of(ready.options).nats)

        await supervisor.run(on_ready, begin_eras, watch.run)
    terminal.remark("stopped")


def _store_repair(data: Path, terminal: Terminal) -> Callable[[ServiceSpec], None]:
    """Return a function that repairs a broker's store before each start."""

    def repair(spec: ServiceSpec) -> None:
        if spec.start_phase == 0:
            store = data / spec.name.replace(NATS, "nats")
            drop_indexes(store)
            for consumer in set_aside_unreadable(store, data / "damaged"):
                terminal.remark(f"the position of consumer {consumer} was unreadable: it restarts at the beginning")

    return repair


async def _rebuild(ready: _Prepared, terminal: Terminal) -> int:
    (billing,) = (spec for spec in ready.specs if spec.name == "billing")
    data, brokers = ready.options.data, [spec for spec in ready.specs if spec.start_phase == 0]
    supervisor = Supervisor(brokers, data / "logs", _discard, _store_repair(data, terminal))
    supervisor.stop_on_signals()
    rebuilding: list[asyncio.Task[int]] = []

    async def run() -> int:
        try:
            command = (sys.executable, "-m", "services.billing", "rebuild")
            process = await asyncio.create_subprocess_exec(*command, env=billing.env)
            return await process.wait()
        finally:
            supervisor.stop()

    terminal.remark(f"rebuilding (data in {data})")
    await supervisor.run(lambda: rebuilding.append(asyncio.create_task(run())))
    return await rebuilding[0] if rebuilding else EXIT_FAILED


def _discard(_line: str) -> None:
    """Discard the line of a temporary broker; its log file has it."""


def _announce(terminal: Terminal, head: str, rows: list[tuple[str, str]]) -> None:
    terminal.show(head)
    for label, text in rows:
        terminal.show(f"  {terminal.dim(f'{label:<8}')}  {text}" if label else f"  {terminal.dim(text)}")


def _resolve_options(up_options: UpOptions, data: Path, wanted: Mapping[str, int]) -> Options:
    first_producer = wanted["producer"]
    producers = [
        WantedPort(
            "producer" if number == 0 else f"producer {number + 1}",
            first_producer + number if first_producer else 0,
            "--producer-port or TAILRACE_PRODUCER_PORT",
        )
        for number in range(up_options.producers)
    ]
    ports = settle_ports(
        [
            WantedPort("delivery", wanted["delivery"], "--port or TAILRACE_DELIVERY_PORT"),
            WantedPort("gRPC", wanted["grpc"], "--grpc-port or TAILRACE_DELIVERY_GRPC_PORT"),
            WantedPort("billing", wanted["billing"], "--billing-port or TAILRACE_BILLING_PORT"),
            WantedPort("NATS", wanted["nats"], "--nats-port or TAILRACE_NATS_PORT"),
            *producers,
            *_node_ports(up_options.cluster, wanted["nats"]),
        ]
    )
    delivery, grpc, billing, nats, *others = ports
    nodes = others[up_options.producers :]
    return Options(
        data=data,
        config=up_options.config,
        delivery_port=delivery,
        grpc_port=grpc,
        billing_port=billing,
        nats_port=nats,
        producer_ports=tuple(others[: up_options.producers]),
        node_ports=tuple(nodes[: up_options.cluster - 1]),
        route_ports=tuple(nodes[up_options.cluster - 1 :]),
    )


def _node_ports(cluster: int, first: int) -> list[WantedPort]:
    """Return the client ports of a cluster's further servers, and a route port for each server."""
    if cluster == 1:
        return []
    clients = [
        WantedPort(f"NATS {n + 1}", first + n if first else 0, "--nats-port or TAILRACE_NATS_PORT")
        for n in range(1, cluster)
    ]
    return [*clients, *(WantedPort(f"NATS route {n}", 0, "") for n in range(1, cluster + 1))]


def _section(config: dict[str, Any], table: str) -> dict[str, Any]:
    section = config.get(table)
    return section if isinstance(section, dict) else {}
