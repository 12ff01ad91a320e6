"""Settings: frozen structs, read once from the environment and the TOML file.

A field ``port`` of the struct for the service ``delivery`` is the variable ``TAILRACE_DELIVERY_PORT`` and the key
``port`` of the table ``[delivery]`` in the file that ``TAILRACE_CONFIG`` names; fields of `Shared` are
``TAILRACE_<FIELD>`` and keys of ``[shared]``. The environment takes precedence. All problems are reported together.
"""

import ssl
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from schemas.names import NAME_PATTERN
from schemas.topology import Topology
from services.kit.tls import ServerTls, TlsUnusable, client_tls, server_tls

__all__ = ["SERVICES", "SettingsError", "Shared", "load_settings", "own_tls", "read_config"]

SERVICES: Final = ("producer", "delivery", "billing")
_TABLES: Final = ("shared", *SERVICES, "providers", "models")
T = TypeVar("T", bound=msgspec.Struct)
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]


class SettingsError(Exception):
    """One or more settings are wrong; ``problems`` names each with its variable or key."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("settings are not usable:\n" + "\n".join(f"  - {p}" for p in problems))


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """Settings shared by all services. Ages in seconds, sizes in bytes.

    ``manage_streams``: whether a service creates and changes streams, or waits for them. ``nats_ca``, ``nats_cert``,
    ``nats_key``: files for TLS to the broker; any of them requires it. ``auth``: whether callers need credentials:
    ``auto`` requires them when any are set up, and without them refuses to start if others can reach the service.
    ``published``: the public address of the services behind an edge. ``admin_key_hash``: ``<id>.<hash>`` of the
    operator's key. ``jwt_secret_file``, ``jwt_public_keys`` (PEM files), ``jwt_jwks_url``: keys that verify tokens.
    """

    nats_url: str = "nats://127.0.0.1:4222"
    nats_ca: str | None = None
    nats_cert: str | None = None
    nats_key: str | None = None
    nats_port: int = 4222
    data: str = ".tailrace"
    config: str | None = None
    tenant: Name = "default"
    partitions: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    retention: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    log_max_bytes: int = -1
    manage_streams: bool = True
    pool: Name = "default"
    max_requests: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    lease: Annotated[float, msgspec.Meta(ge=1)] = 15.0
    max_deliver: Annotated[int, msgspec.Meta(ge=1)] = 5
    auth: Literal["auto", "required", "insecure"] = "auto"
    published: str | None = None
    admin_key_hash: str | None = None
    jwt_secret_file: str | None = None
    jwt_public_keys: tuple[str, ...] = ()
    jwt_jwks_url: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: Annotated[str, msgspec.Meta(min_length=1)] = "tailrace"
    jwt_tenant_claim: Annotated[str, msgspec.Meta(min_length=1)] = "tenant"
    jwt_leeway: Annotated[float, msgspec.Meta(ge=0, le=300)] = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context of the connection to the broker.

        Raises:
            SettingsError: a file cannot be used.
        """
        try:
            return client_tls(self.nats_ca, self.nats_cert, self.nats_key)
        except TlsUnusable as error:
            raise SettingsError([str(error)]) from error

    def described(self) -> dict[str, object]:
        """Return the settings that an operator compares between services; none is secret."""
        return {name: getattr(self, name) for name in ("auth", "partitions", "replicas", "retention", "pool")}

    def topology(self) -> Topology:
        """Return the topology of these settings: streams and consumers."""
        return Topology(
            partitions=self.partitions,
            managed=self.manage_streams,
            replicas=self.replicas,
            max_age=self.retention,
            max_bytes=self.log_max_bytes,
            pool=self.pool,
            max_requests=self.max_requests,
            ack_wait=self.lease,
        )


def own_tls(service: str, cert: str | None, key: str | None) -> ServerTls | None:
    """Return the TLS files of a service's own ports; ``None`` when its settings name no file.

    Raises:
        SettingsError: a file is missing or cannot be used.
    """
    try:
        return server_tls(cert, key, f"TAILRACE_{service.upper()}_")
    except TlsUnusable as error:
        raise SettingsError([str(error)]) from error


def read_config(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the TOML file that ``TAILRACE_CONFIG`` names, or an empty table.

    Raises:
        SettingsError: the file cannot be read or is not TOML.
    """
    path = env.get("TAILRACE_CONFIG")
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise SettingsError([f"TAILRACE_CONFIG: cannot read {path}: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError([f"TAILRACE_CONFIG: {path} is not valid TOML: {error}"]) from error


def load_settings(cls: type[T], service: str, env: Mapping[str, str]) -> tuple[Shared, T]:
    """Load the shared settings and those of one service.

    Raises:
        SettingsError: a value has the wrong type or range, or a ``TAILRACE_`` variable is not known.
    """
    config = read_config(env)
    problems: list[str] = []
    prefix = f"TAILRACE_{service.upper()}_"
    for table in (t for t in ("shared", service) if not isinstance(config.get(t, {}), dict)):
        problems.append(f"[{table}]: must be a table")
        config[table] = {}
    shared = _read(Shared, "TAILRACE_", "shared", config, env, problems)
    own = _read(cls, prefix, service, config, env, problems)
    problems += _unknown(cls, service, config, env)
    if problems or shared is None or own is None:
        raise SettingsError(problems)
    return shared, own


def _unknown(cls: type[msgspec.Struct], service: str, config: dict[str, Any], env: Mapping[str, str]) -> list[str]:
    prefix = f"TAILRACE_{service.upper()}_"
    known = {f"TAILRACE_{f.upper()}" for f in Shared.__struct_fields__}
    known |= {prefix + f.upper() for f in cls.__struct_fields__}
    others = tuple(f"TAILRACE_{s.upper()}_" for s in SERVICES if s != service)
    problems = [
        f"{name}: no such setting"
        for name in sorted(env)
        if name.startswith("TAILRACE_") and name not in known and not name.startswith(others)
    ]
    problems += [f"[{table}]: there is no such table" for table in sorted(set(config) - set(_TABLES))]
    for table, struct in (("shared", Shared), (service, cls)):
        unknown = set(config.get(table, {})) - set(struct.__struct_fields__)
        problems += [f"[{table}] {key}: no such setting" for key in sorted(unknown)]
    return problems


def _read(
    cls: type[T], prefix: str, table: str, config: Mapping[str, Any], env: Mapping[str, str], problems: list[str]
) -> T | None:
    section = config.get(table, {})
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(cls):
        variable = prefix + field.name.upper()
        if variable in env:
            raw: Any = _split(env[variable], hints[field.name])
        elif field.name in section:
            raw, variable = section[field.name], f"[{table}] {field.name}"
        else:
            if field.required:
                problems.append(f"{variable}: must be set")
            continue
        try:
            values[field.name] = msgspec.convert(raw, hints[field.name], strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{variable}: {str(error)[0].lower()}{str(error)[1:]}")
    if problems:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(str(error))
        return None


def _split(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _split(text, typing.get_args(hint)[0])
    if origin in (list, tuple):
        return [part.strip() for part in text.split(",") if part.strip()]
    if origin in (typing.Union, types.UnionType) and text == "":
        return None
    return text
