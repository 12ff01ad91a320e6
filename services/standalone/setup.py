"""``tailrace topology``: create streams, consumers and buckets on the broker, and render the broker's users."""

import asyncio
import os
import ssl
from typing import Final

import msgspec

from schemas.permissions import users_config
from schemas.topology import token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.logs import Logs
from services.kit.settings import SettingsError, Shared, load_settings
from services.kit.telemetry import configure_logging
from services.standalone.errors import CannotStart, Unreachable
from services.standalone.plan import without_own_variables

__all__ = ["apply_topology", "begin_new_eras", "renew", "users"]


CONNECT_SECONDS: Final = 5.0


class _Nothing(msgspec.Struct):
    """Empty struct: the setup has no settings of its own."""


def apply_topology() -> str:
    """Create or update streams, consumers and buckets from the shared settings; return a summary line.

    Raises:
        CannotStart: settings are invalid.
        Unreachable: the broker does not answer, or rejects the request.
    """
    shared = _shared()
    configure_logging("setup", "warning", shared.log_format)
    try:
        return asyncio.run(_apply(shared))
    except SettingsError as error:
        raise CannotStart(str(error)) from error
    except BrokerUnavailable as error:
        raise Unreachable(str(error)) from error


async def _apply(shared: Shared) -> str:
    async with Broker.connect(shared.nats_url, "setup", tls=shared.tls(), wait=CONNECT_SECONDS) as broker:
        topology = await broker.apply(msgspec.structs.replace(shared.topology(), managed=True))
    streams = ", ".join(stream.name for stream in topology.streams())
    return f"{streams} ({topology.replicas} replica{'s' if topology.replicas > 1 else ''})"


def renew() -> str:
    """Begin a new era in all logs, after a store was restored or the machine crashed; return a summary line.

    Raises:
        CannotStart: settings are invalid.
        Unreachable: the broker does not answer, or rejects the request.
    """
    shared = _shared()
    try:
        begun = asyncio.run(begin_new_eras(shared.nats_url, shared.tls()))
    except SettingsError as error:
        raise CannotStart(str(error)) from error
    except BrokerUnavailable as error:
        raise Unreachable(str(error)) from error
    return f"new era: {', '.join(begun)}" if begun else "no log has events"


async def begin_new_eras(nats_url: str, tls: ssl.SSLContext | None = None) -> list[str]:
    """Begin a new era in all non-empty logs; return their streams.

    Raises:
        BrokerUnavailable: the broker does not answer.
    """
    begun = []
    async with Broker.connect(nats_url, "setup", tls=tls) as broker:
        logs = Logs(broker)
        for partition in await broker.partitions():
            if await logs.begin_era(partition):
                begun.append(token_stream(partition))
    return begun


def users() -> str:
    """Return the users of the broker with their permissions, as nats-server configuration.

    Raises:
        CannotStart: settings are invalid.
    """
    return users_config(_shared().topology())


def _shared() -> Shared:
    try:
        return load_settings(_Nothing, "setup", without_own_variables(os.environ))[0]
    except SettingsError as error:
        raise CannotStart(str(error)) from error
