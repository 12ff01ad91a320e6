"""Ports for ``tailrace up``: all checked before anything starts, all problems said together."""

import socket
from collections.abc import Sequence

import msgspec

from services.standalone.errors import PortsTaken

__all__ = ["PortWish", "settle_ports"]


class PortWish(msgspec.Struct, frozen=True):
    """A port that somebody wants: ``0`` asks for any free one. ``option`` says how to choose another."""

    name: str
    port: int
    option: str


def settle_ports(wishes: Sequence[PortWish]) -> list[int]:
    """Return a free loopback port for each wish, in order.

    Raises:
        PortsTaken: some are in use, not allowed, or wanted twice.
    """
    problems: list[str] = []
    owners: dict[int, str] = {}
    held: list[socket.socket] = []
    try:
        for wish in wishes:
            if wish.port in owners:
                problems.append(f"{wish.port} for {wish.name} is also the port of {owners[wish.port]} ({wish.option})")
                continue
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wish.port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                problems.append(f"{wish.port} for {wish.name}: {reason.lower()} ({wish.option})")
            else:
                owners[probe.getsockname()[1]] = wish.name
        if problems:
            raise PortsTaken(problems)
        return list(owners)
    finally:
        for probe in held:
            probe.close()
