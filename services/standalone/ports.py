"""Resolve and check the ports of ``tailrace up`` before anything starts; report all problems together."""

import socket
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from services.standalone.errors import PortsTaken

__all__ = ["PORTS", "WantedPort", "read_ports", "settle_ports"]


class _Port(NamedTuple):
    """The settings key, variable and default of a port."""

    table: str
    key: str
    variable: str
    default: int


PORTS: Final = {
    "delivery": _Port("delivery", "port", "TAILRACE_DELIVERY_PORT", 8080),
    "grpc": _Port("delivery", "grpc_port", "TAILRACE_DELIVERY_GRPC_PORT", 50051),
    "billing": _Port("billing", "port", "TAILRACE_BILLING_PORT", 8081),
    "producer": _Port("producer", "port", "TAILRACE_PRODUCER_PORT", 8082),
    "nats": _Port("shared", "nats_port", "TAILRACE_NATS_PORT", 4222),
}


class WantedPort(msgspec.Struct, frozen=True):
    """A port to bind; ``0`` means any free port. ``option``: the flag or variable that sets it, for error texts."""

    name: str
    port: int
    option: str


def read_ports(
    flags: Mapping[str, int | None], env: Mapping[str, str], config: Mapping[str, Any], problems: list[str]
) -> dict[str, int]:
    """Return the port of each part: its flag, else its variable, else the file, else the default.

    Invalid values are added to ``problems``.
    """
    ports: dict[str, int] = {}
    for name, (table, key, variable, default) in PORTS.items():
        section = config.get(table)
        value: Any = flags.get(name)
        source = variable
        if value is None:
            value = env.get(variable)
        if not value and value != 0:
            value, source = (section if isinstance(section, dict) else {}).get(key, default), f"[{table}] {key}"
        try:
            ports[name] = msgspec.convert(value, Annotated[int, msgspec.Meta(ge=0, le=65_535)], strict=False)
        except msgspec.ValidationError:
            problems.append(f"{source}: must be a port number (0 for any free port), not {value!r}")
    return ports


def settle_ports(wanted_ports: Sequence[WantedPort]) -> list[int]:
    """Return a free loopback port for each of ``wanted_ports``, in order.

    Raises:
        PortsTaken: a port is in use, not permitted, or wanted twice.
    """
    problems: list[str] = []
    owners: dict[int, str] = {}
    held: list[socket.socket] = []
    try:
        for wanted in wanted_ports:
            if wanted.port in owners:
                problems.append(
                    f"{wanted.port} for {wanted.name} is also the port of {owners[wanted.port]} ({wanted.option})"
                )
                continue
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted.port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                problems.append(f"{wanted.port} for {wanted.name}: {reason.lower()} ({wanted.option})")
            else:
                owners[probe.getsockname()[1]] = wanted.name
        if problems:
            raise PortsTaken(problems)
        return list(owners)
    finally:
        for probe in held:
            probe.close()
