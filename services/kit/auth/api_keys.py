"""API keys: mint, parse and compare them. Only a hash of a key is ever stored. Pure, except for the random numbers."""

import hashlib
import hmac
import re
import secrets
from typing import Annotated, Final, NamedTuple

import msgspec

from schemas.names import NAME_PATTERN
from services.kit.auth.principal import SCOPES, Principal, Scope

__all__ = ["KEY_PREFIX", "KeyRecord", "MintedKey", "SessionPattern", "admin_record", "matches", "mint", "parse"]

KEY_PREFIX: Final = "tr_"
SessionPattern = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_*-]{1,64}$")]
_KEY: Final = re.compile(r"tr_([a-z0-9]{4,32})_([A-Za-z0-9_-]{43})")
_ADMIN: Final = re.compile(r"([a-z0-9]{4,32})\.([0-9a-f]{64})")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The stored record of an API key. Times in seconds since 1970; ``expires_at`` ``None``: never.

    ``hash``: SHA-256 of the secret part, in hexadecimal. The secret has 256 random bits, so a slow hash would add no
    protection. ``operator``: it may create keys for every tenant; only the key in the settings may.
    """

    id: str
    tenant: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    name: str = ""
    scopes: tuple[Scope, ...] = ()
    sessions: tuple[SessionPattern, ...] = ("*",)
    hash: str
    created_at: float = 0.0
    expires_at: float | None = None
    operator: bool = False

    def principal(self) -> Principal:
        """Return the principal of the key."""
        return Principal(
            tenant=self.tenant,
            key=KEY_PREFIX + self.id,
            scopes=frozenset(self.scopes),
            sessions=self.sessions,
            expires_at=self.expires_at,
            operator=self.operator,
        )


class MintedKey(NamedTuple):
    """A new key: ``text`` is shown to its owner once, ``hash`` is stored."""

    id: str
    text: str
    hash: str


def mint() -> MintedKey:
    """Return a new key ``tr_<id>_<secret>``."""
    id_, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return MintedKey(id_, f"{KEY_PREFIX}{id_}_{secret}", _digest(secret))


def parse(text: str) -> tuple[str, str] | None:
    """Return id and secret of an API key; ``None`` if the text is not one."""
    match = _KEY.fullmatch(text)
    return (match[1], match[2]) if match else None


def matches(record: KeyRecord, secret: str) -> bool:
    """Compare a secret with the record's hash in constant time."""
    return hmac.compare_digest(_digest(secret).encode(), record.hash.encode())


def admin_record(setting: str, tenant: str) -> KeyRecord:
    """Return the record of the operator's key, which the settings hold as ``<id>.<hash>``.

    Raises:
        ValueError: it has another form.
    """
    match = _ADMIN.fullmatch(setting)
    if match is None:
        raise ValueError("must be <id>.<hash> as `tailrace keys bootstrap` prints it (never the key itself)")
    return KeyRecord(
        id=match[1], tenant=tenant, name="bootstrap", scopes=tuple(sorted(SCOPES)), hash=match[2], operator=True
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
