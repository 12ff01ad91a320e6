"""Plan the processes of ``tailrace up``, their environment and their order, as data. Pure."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from services.kit.shutdown import MARGIN

__all__ = [
    "NATS",
    "Addresses",
    "Options",
    "ServiceSpec",
    "asks_for_credentials",
    "console_models",
    "PROVIDER_KEYS",
    "node_files",
    "plan_services",
    "summary",
    "without_own_variables",
]

NATS: Final = "nats-server"
DRAIN: Final = 2.0
"""Default drain of the services in seconds after Ctrl-C: short, because a person is waiting."""
BROKER_GRACE: Final = 10.0
BEYOND_MARGIN: Final = 1.0
_OWN_VARIABLES: Final = frozenset(
    {"TAILRACE_URL", "TAILRACE_BILLING_URL", "TAILRACE_PRODUCERS", "TAILRACE_CLUSTER", "TAILRACE_KEY"}
)
"""Variables of the command line, which the services would reject as unknown."""
_DRAINING: Final = ("producer", "delivery", "billing")
_CREDENTIALS: Final = ("admin_key_hash", "jwt_secret_file", "jwt_public_keys", "jwt_jwks_url")
_SCRIPTED: Final = ("scripted/story", "scripted/reasoning", "scripted/tools")
_KEYED: Final = {
    "OPENAI_API_KEY": "openai/gpt-4o-mini",
    "ANTHROPIC_API_KEY": "anthropic/claude-haiku-4-5",
    "CO_API_KEY": "cohere/command-a-03-2025",
    "OPENROUTER_API_KEY": "openrouter/openai/gpt-4o-mini",
}


PROVIDER_KEYS: Final = tuple(_KEYED)
"""Variables of provider keys, as the providers' own SDKs name them."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved options of ``tailrace up``. ``data`` is absolute; further producers' ports follow ``producer_ports[0]``.

    ``node_ports``: client ports of a cluster's further nats-servers. ``route_ports``: route ports of all its servers.
    """

    data: Path
    delivery_port: int
    grpc_port: int
    billing_port: int
    producer_ports: tuple[int, ...]
    nats_port: int
    node_ports: tuple[int, ...] = ()
    route_ports: tuple[int, ...] = ()
    config: Path | None = None


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """URLs of the services; ``nats`` lists all servers of a cluster, separated by commas."""

    page: str
    billing: str
    producers: tuple[str, ...]
    nats: str

    @classmethod
    def of(cls, options: Options) -> "Addresses":
        """Return the loopback addresses for these options."""
        return cls(
            page=f"http://127.0.0.1:{options.delivery_port}",
            billing=f"http://127.0.0.1:{options.billing_port}",
            producers=tuple(f"http://127.0.0.1:{port}" for port in options.producer_ports),
            nats=",".join(f"nats://127.0.0.1:{port}" for port in (options.nats_port, *options.node_ports)),
        )


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process: command, environment, readiness address, and start and stop order.

    ``start_phase`` and ``stop_phase``: lower phases first, processes of one phase together. ``ready``: an ``http://…``
    address that answers 200 when the service is ready, or ``nats://127.0.0.1:<port>``. ``grace``: seconds between
    SIGTERM and SIGKILL, longer than the service's own bound.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready: str
    start_phase: int
    stop_phase: int
    grace: float


def without_own_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of the command line."""
    return {name: value for name, value in env.items() if name not in _OWN_VARIABLES}


def console_models(env: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Return the models that the console offers: configured aliases, models whose key is set, and the scripted ones."""
    configured = config.get("models")
    aliases = list(configured) if isinstance(configured, dict) else []
    keyed = [model for variable, model in _KEYED.items() if env.get(variable)]
    return list(dict.fromkeys([*aliases, *keyed, *_SCRIPTED]))


def has_key(env: Mapping[str, str]) -> bool:
    """Return whether a conventional variable configures a provider other than the scripted one."""
    return any(env.get(variable) for variable in (*_KEYED, "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"))


def asks_for_credentials(env: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether the services, which listen on loopback, will require credentials."""
    table = config.get("shared")
    given = {name: env.get(f"TAILRACE_{name.upper()}") or (table or {}).get(name) for name in _CREDENTIALS}
    auth = env.get("TAILRACE_AUTH") or (table or {}).get("auth")
    return auth == "required" or (auth != "insecure" and any(given.values()))


def plan_services(
    options: Options, env: Mapping[str, str], config: Mapping[str, Any], nats_server: str
) -> list[ServiceSpec]:
    """Return the processes to run. ``env``: the caller's environment. ``config``: the content of its TOML file.

    Start order: brokers, then producers and billing, then delivery. Stop order: delivery and producers, which drain,
    then billing, which books their last events, then the brokers.
    """
    addresses = Addresses.of(options)
    child_env = _child_env(options, env, config)
    brokers = [
        ServiceSpec(
            name=name,
            argv=(nats_server, "-c", str(path)),
            env=child_env,
            ready=url,
            start_phase=0,
            stop_phase=2,
            grace=BROKER_GRACE,
        )
        for (name, path), url in zip(node_files(options).items(), addresses.nats.split(","), strict=True)
    ]
    graces = {service: _grace(service, child_env, config) for service in _DRAINING}
    billing = _python_service(
        "billing", "billing", child_env, options.billing_port, graces, start_phase=1, stop_phase=1
    )
    producers = [
        _python_service(
            "producer" if number == 1 else f"producer-{number}",
            "producer",
            child_env,
            port,
            graces,
            start_phase=1,
            stop_phase=0,
        )
        for number, port in enumerate(options.producer_ports, start=1)
    ]
    delivery = _python_service(
        "delivery", "delivery", child_env, options.delivery_port, graces, start_phase=2, stop_phase=0
    )
    return [*brokers, *producers, billing, delivery]


def node_files(options: Options) -> dict[str, Path]:
    """Return the configuration file of each nats-server by server name; its store has the same path without suffix."""
    if not options.node_ports:
        return {NATS: options.data / "nats.conf"}
    return {f"nats-{n}": options.data / f"nats-{n}.conf" for n in range(1, len(options.node_ports) + 2)}


def _python_service(
    name: str,
    service: str,
    env: Mapping[str, str],
    port: int,
    graces: Mapping[str, float],
    *,
    start_phase: int,
    stop_phase: int,
) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        argv=(sys.executable, "-m", f"services.{service}"),
        env={**env, f"TAILRACE_{service.upper()}_PORT": str(port), f"TAILRACE_{service.upper()}_HOST": "127.0.0.1"},
        ready=f"http://127.0.0.1:{port}/readyz",
        start_phase=start_phase,
        stop_phase=stop_phase,
        grace=graces[service],
    )


def _grace(service: str, env: Mapping[str, str], config: Mapping[str, Any]) -> float:
    """Return the seconds between SIGTERM and SIGKILL of a service: its drain and a margin.

    Delivery with workers has two margins: one for the workers, one for its supervisor.
    """
    drain = _number(env, config, service, "drain", DRAIN)
    has_workers = service == "delivery" and _number(env, config, service, "workers", 1) > 1
    return drain + (MARGIN + BEYOND_MARGIN) * (2 if has_workers else 1)


def _number(env: Mapping[str, str], config: Mapping[str, Any], service: str, field: str, default: float) -> float:
    """Return a numeric setting as the service reads it, or ``default`` when it is missing or not a number."""
    section = config.get(service)
    value = env.get(f"TAILRACE_{service.upper()}_{field.upper()}")
    if value is None and isinstance(section, dict):
        value = section.get(field)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _child_env(options: Options, env: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the caller's environment with the services' addresses and defaults; explicit settings replace defaults."""
    child = without_own_variables(env)
    addresses = Addresses.of(options)
    defaults = {
        ("delivery", "billing_url"): addresses.billing,
        ("delivery", "console_models"): ",".join(console_models(env, config)),
        ("billing", "cors_origins"): f"{addresses.page},http://localhost:{options.delivery_port}",
        **{(service, "drain"): f"{DRAIN:g}" for service in _DRAINING},
    }
    if options.node_ports:
        defaults["shared", "replicas"] = str(min(5, 1 + len(options.node_ports)))
    for (service, field), value in defaults.items():
        table = config.get(service)
        if not isinstance(table, dict) or field not in table:
            prefix = "" if service == "shared" else f"{service.upper()}_"
            child.setdefault(f"TAILRACE_{prefix}{field.upper()}", value)
    child |= {
        "TAILRACE_NATS_URL": addresses.nats,
        "TAILRACE_NATS_PORT": str(options.nats_port),
        "TAILRACE_DATA": str(options.data),
        "TAILRACE_LOG_FORMAT": "json",
        "TAILRACE_MANAGE_STREAMS": "true",
        "PYTHONUNBUFFERED": "1",
    }
    child |= {f"TAILRACE_NATS_{name}": "" for name in ("CA", "CERT", "KEY")}
    child |= {f"TAILRACE_{service}_TLS_{name}": "" for service in ("DELIVERY", "BILLING") for name in ("CERT", "KEY")}
    child["TAILRACE_DELIVERY_GRPC_PORT"] = str(options.grpc_port)
    if options.config is not None:
        child["TAILRACE_CONFIG"] = str(options.config)
    return child


def summary(
    options: Options, nats_version: str, env: Mapping[str, str], config: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Return the lines to show once all services are ready, as pairs of label and text; a hint has an empty label."""
    addresses = Addresses.of(options)
    rows = [
        ("page", addresses.page),
        ("API docs", f"{addresses.page}/docs"),
        ("gRPC", f"127.0.0.1:{options.grpc_port}"),
        ("billing", f"{addresses.billing}/v1/usage"),
        ("metrics", "  ".join(f"{url}/metrics" for url in (addresses.page, addresses.billing, *addresses.producers))),
        ("NATS", f"{addresses.nats.replace(',', '  ')}  (nats-server {nats_version})"),
        ("data", f"{options.data}  (logs in {options.data / 'logs'})"),
    ]
    if not asks_for_credentials(env, config or {}):
        rows.append(("", "reachable only from this machine; no credentials required"))
    if options.config is None and not has_key(env):
        rows.append(("", "no API key set: the scripted provider answers"))
    port = "" if options.delivery_port == 8080 else f" --url {addresses.page}"
    rows.append(("", f'try: tailrace ask "what is a tailrace?"{port}'))
    rows.append(("", "Ctrl-C stops everything; the data is kept"))
    return rows
