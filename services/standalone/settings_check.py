"""Validate the settings of all services before one starts; list the settings that `tailrace up` overrides."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from services.kit.settings import SERVICES, SettingsError, load_settings
from services.standalone.plan import without_own_variables
from services.standalone.ports import PORTS

__all__ = ["overruled", "wrong_settings"]

_OVERRULED: Final = {
    "nats_url": "it runs its own broker",
    "nats_ca": "its broker listens without TLS and only on this machine",
    "nats_cert": "its broker listens without TLS and only on this machine",
    "nats_key": "its broker listens without TLS and only on this machine",
    "manage_streams": "its services create the streams",
    "log_format": "it logs to files, as JSON",
    "host": "its services listen only on this machine",
    "tls_cert": "its services listen without TLS and only on this machine",
    "tls_key": "its services listen without TLS and only on this machine",
}
"""Settings that `tailrace up` overrides, with the reason."""


def wrong_settings(env: Mapping[str, str]) -> list[str]:
    """Return the problems in the settings of all services, each with its variable or key; ports are not checked."""
    services = without_own_variables(env) | {port.variable: str(port.default) for port in PORTS.values()}
    problems: list[str] = []
    for load in _loaders():
        try:
            load(services)
        except SettingsError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))  # each service reports the shared settings


def overruled(env: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Return a line for each explicit setting that `tailrace up` overrides."""
    lines = [
        f"{variable} is not used by `tailrace up`: {_OVERRULED[field]}"
        for variable, field in _variables().items()
        if env.get(variable)
    ]
    for table in ("shared", *SERVICES):
        section = config.get(table)
        if isinstance(section, Mapping):
            lines += [
                f"[{table}] {key} is not used by `tailrace up`: {_OVERRULED[key]}"
                for key in section
                if key in _OVERRULED
            ]
    return lines


def _variables() -> dict[str, str]:
    """Return the variable of each overridden setting, mapped to its field."""
    names = {f"TAILRACE_{field.upper()}": field for field in _OVERRULED if field not in ("host", "tls_cert", "tls_key")}
    for service in SERVICES:
        names |= {f"TAILRACE_{service.upper()}_{field.upper()}": field for field in ("host", "tls_cert", "tls_key")}
    return names


def _loaders() -> list[Callable[[Mapping[str, str]], object]]:
    # Imported here: the modules of the services' settings are slow to load.
    from services.billing.settings import Settings as Billing
    from services.delivery.settings import Settings as Delivery
    from services.producer.settings import load_producer_settings

    return [
        load_producer_settings,
        lambda env: load_settings(Delivery, "delivery", env),
        lambda env: load_settings(Billing, "billing", env),
    ]
