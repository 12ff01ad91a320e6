"""Configure authentication from the settings: whether credentials are required, and how they are checked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

from services.kit.auth.api_keys import KeyRecord, admin_record
from services.kit.auth.authenticator import Authenticator
from services.kit.auth.jwks import KeySet, check_jwks_url
from services.kit.auth.jwt_verifier import JwtPolicy, JwtVerifier, VerifyingKey, pem_key, secret_key
from services.kit.auth.key_table import KeyTable
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker
from services.kit.loopback import is_loopback
from services.kit.settings import SettingsError, Shared

__all__ = ["authenticating", "build_authenticator", "needs_credentials"]

log = structlog.get_logger()
_HINT: Final = (
    "set TAILRACE_ADMIN_KEY_HASH (`tailrace keys bootstrap` makes one) or a TAILRACE_JWT_… setting; "
    "TAILRACE_AUTH=insecure serves everybody, for networks that nobody else reaches"
)


@asynccontextmanager
async def authenticating(shared: Shared, host: str, broker: Broker, clock: Clock) -> AsyncIterator[Authenticator]:
    """Provide an authenticator while the block runs; log whether credentials are required.

    Raises:
        SettingsError: a setting is wrong, or others can reach ``host`` and no credentials are set up.
        BrokerUnavailable: API keys cannot be read.
    """
    authenticator = build_authenticator(shared, host, broker, clock)
    if authenticator.everybody is not None:
        notify = log.warning if shared.auth == "insecure" else log.info
        notify("no credentials are asked for: everybody who reaches this address may do everything", host=host)
    async with authenticator.running():
        yield authenticator


def build_authenticator(shared: Shared, host: str, broker: Broker, clock: Clock) -> Authenticator:
    """Return the authenticator of a service that listens on ``host``.

    Raises:
        SettingsError: a setting is wrong, or others can reach ``host`` and no credentials are set up.
    """
    problems: list[str] = []
    keys = KeyTable(broker, clock, _fixed_keys(shared, problems))
    tokens = _tokens(shared, clock, problems)
    if problems:
        raise SettingsError(problems)
    everybody = None if needs_credentials(shared, host) else Principal(tenant=shared.tenant, operator=True)
    is_local = everybody is not None and shared.auth != "insecure"
    return Authenticator(clock, keys, tokens, everybody=everybody, is_local=is_local)


def needs_credentials(shared: Shared, host: str) -> bool:
    """Return whether callers of a service that listens on ``host`` need credentials.

    Raises:
        SettingsError: others can reach it and no credentials are set up.
    """
    if shared.auth == "insecure":
        return False
    is_set_up = shared.admin_key_hash is not None or _has_tokens(shared)
    if shared.auth == "required" or is_set_up:
        return True
    reached_at = shared.published or host
    if is_loopback(reached_at):
        return False
    raise SettingsError([f"others can reach {reached_at}, and no credentials are set up: {_HINT}"])


def _has_tokens(shared: Shared) -> bool:
    return bool(shared.jwt_secret_file or shared.jwt_public_keys or shared.jwt_jwks_url)


def _fixed_keys(shared: Shared, problems: list[str]) -> list[KeyRecord]:
    if shared.admin_key_hash is None:
        return []
    try:
        return [admin_record(shared.admin_key_hash, shared.tenant)]
    except ValueError as error:
        problems.append(f"TAILRACE_ADMIN_KEY_HASH: {error}")
        return []


def _tokens(shared: Shared, clock: Clock, problems: list[str]) -> JwtVerifier | None:
    if not _has_tokens(shared):
        return None
    keys: list[VerifyingKey] = []
    if shared.jwt_secret_file is not None:
        keys += _read("TAILRACE_JWT_SECRET_FILE", shared.jwt_secret_file, problems)
    for path in shared.jwt_public_keys:
        keys += _read("TAILRACE_JWT_PUBLIC_KEYS", path, problems)
    published = None
    if shared.jwt_jwks_url is not None:
        try:
            published = KeySet(check_jwks_url(shared.jwt_jwks_url), clock)
        except ValueError as error:
            problems.append(f"TAILRACE_JWT_JWKS_URL: {error}")
        if shared.jwt_issuer is None:
            problems.append("TAILRACE_JWT_ISSUER: must be set with TAILRACE_JWT_JWKS_URL")
    policy = JwtPolicy(
        audience=shared.jwt_audience,
        issuer=shared.jwt_issuer,
        tenant_claim=shared.jwt_tenant_claim,
        leeway=shared.jwt_leeway,
    )
    return JwtVerifier(policy, keys, published)


def _read(variable: str, path: str, problems: list[str]) -> list[VerifyingKey]:
    try:
        content = Path(path).read_bytes()
        return [secret_key(content.strip()) if variable.endswith("SECRET_FILE") else pem_key(content)]
    except OSError as error:
        problems.append(f"{variable}: cannot read {path}: {error.strerror}")
    except ValueError as error:
        problems.append(f"{variable}: {path}: {error}")
    return []
