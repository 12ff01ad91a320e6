"""Validate the settings of all services before one starts; list the settings that `tailrace up` overrides."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from services.kit.settings import SERVICES, SettingsError, load_settings
from services.standalone.plan import without_own_variables
from services.standalone.ports import PORTS

__all__ = ["overruled", "wrong_settings"]

_OVERRULED: Final = {
    "nats_url": "it runs a broker of its own",
    "nats_ca": "its own broker is reached without TLS, on this machine alone",
    "nats_cert": "its own broker is reached without TLS, on this machine alone",
    "nats_key": "its own broker is reached without TLS, on this machine alone",
    "manage_streams": "its services create the streams",
    "log_format": "logs go into files, as JSON",
    "host": "its services listen on this machine alone",
    "tls_cert": "its services are served without TLS, on this machine alone",
    "tls_key": "its services are served without TLS, on this machine alone",
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
