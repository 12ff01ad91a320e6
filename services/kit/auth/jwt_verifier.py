"""JSON web tokens: verified by PyJWT with keys that are each bound to one algorithm, and converted to a principal.

A token never chooses how it is verified: each key of the settings or of the key set belongs to exactly one of the
allowed algorithms, and only keys of the token's algorithm are tried. So ``none`` is refused, and a public key can never
serve as the secret of an HMAC.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, get_args

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from schemas.names import InvalidName, check_name
from services.kit.auth.principal import Principal, Scope, session_patterns

__all__ = [
    "ALGORITHMS",
    "CredentialRefused",
    "JwtPolicy",
    "JwtVerifier",
    "PublishedKeys",
    "VerifyingKey",
    "jwk_keys",
    "pem_key",
    "principal_from",
    "secret_key",
]

ALGORITHMS: Final = ("HS256", "RS256", "ES256", "EdDSA")
MAX_LENGTH: Final = 8_192
MIN_SECRET_BYTES: Final = 32
MIN_RSA_BITS: Final = 2_048
KEYS_TRIED: Final = 4  # for a token without a key id: each costs a signature check
_SUBJECT: Final = 128
_KNOWN: Final = frozenset(get_args(Scope))


class CredentialRefused(Exception):
    """An invalid credential. ``reason`` is a label of the metric; the text is safe to show."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class VerifyingKey(NamedTuple):
    """A key that verifies one algorithm. ``kid`` ``None``: it matches any key id."""

    algorithm: str
    key: Any
    kid: str | None = None

    def __repr__(self) -> str:
        return f"VerifyingKey({self.algorithm}, kid={self.kid!r})"


class JwtPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The required claims of a token. ``leeway`` in seconds, for clock differences. ``issuer`` ``None``: any."""

    audience: str
    issuer: str | None = None
    tenant_claim: str = "tenant"
    leeway: float = 10.0


def secret_key(secret: bytes) -> VerifyingKey:
    """Return the key of HS256 tokens.

    Raises:
        ValueError: it is shorter than 32 bytes.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes: it must have {MIN_SECRET_BYTES} or more")
    return VerifyingKey("HS256", secret)


def pem_key(pem: bytes) -> VerifyingKey:
    """Return a public key in PEM, bound to the algorithm of its type.

    Raises:
        ValueError: it is no public key of RSA (2048 bits or more), P-256 or Ed25519.
    """
    match load_pem_public_key(pem):
        case RSAPublicKey() as key if key.key_size >= MIN_RSA_BITS:
            return VerifyingKey("RS256", key)
        case EllipticCurvePublicKey() as key if isinstance(key.curve, SECP256R1):
            return VerifyingKey("ES256", key)
        case Ed25519PublicKey() as key:
            return VerifyingKey("EdDSA", key)
    raise ValueError(f"it must be a public key of RSA ({MIN_RSA_BITS} bits or more), P-256 or Ed25519")


def jwk_keys(document: Mapping[str, Any]) -> list[VerifyingKey]:
    """Return the usable keys of a JSON Web Key Set: public ones, for signatures, of the allowed algorithms.

    Unusable keys are ignored. So are symmetric ones: a secret is never published on purpose.

    Raises:
        ValueError: it is no key set.
    """
    listed = document.get("keys")
    if not isinstance(listed, list):
        raise ValueError("the document has no list `keys`")
    found = [_jwk(entry) for entry in listed if isinstance(entry, dict)]
    return [key for key in found if key is not None]


def _jwk(entry: dict[str, Any]) -> VerifyingKey | None:
    if entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if key.algorithm_name not in ALGORITHMS or (isinstance(key.key, RSAPublicKey) and key.key.key_size < MIN_RSA_BITS):
        return None
    kid = entry.get("kid")
    return VerifyingKey(key.algorithm_name, key.key, kid if isinstance(kid, str) else None)


def principal_from(claims: Mapping[str, Any], policy: JwtPolicy) -> Principal:
    """Convert a token's verified claims to a principal. Foreign scopes are ignored.

    Raises:
        CredentialRefused: the tenant is missing or no name, or a claim has the wrong form.
    """
    try:
        tenant = check_name("tenant", claims.get(policy.tenant_claim, ""))
        sessions = session_patterns(_words(claims.get("sessions", "*")))
        scopes = _words(claims.get("scope", claims.get("scopes", ())))
    except (InvalidName, ValueError) as error:
        raise CredentialRefused("claims", f"a claim of the token is not valid: {error}") from error
    subject = str(claims.get("sub", ""))[:_SUBJECT]
    return Principal(
        tenant=tenant,
        key=f"jwt:{subject}",
        scopes=frozenset(_KNOWN.intersection(scopes)),
        sessions=sessions,
        expires_at=float(claims["exp"]),
    )


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    raise ValueError("scope and sessions must be text separated by spaces, or lists of text")


class PublishedKeys(Protocol):
    """The port to an issuer's published keys."""

    async def keys(self, kid: str | None) -> Sequence[VerifyingKey]:
        """Return the current keys, fetched again if ``kid`` is unknown."""

    async def close(self) -> None:
        """Stop background work."""


class JwtVerifier:
    """Verify tokens with the keys of the settings and the issuer's published keys."""

    def __init__(
        self,
        policy: JwtPolicy,
        keys: Sequence[VerifyingKey] = (),
        published: PublishedKeys | None = None,
    ) -> None:
        self._policy = policy
        self._keys = tuple(keys)
        self._published = published
        required = ["exp", "aud", *(["iss"] if policy.issuer else [])]
        self._options: Any = {"require": required, "enforce_minimum_key_length": True}

    async def verify(self, token: str) -> Principal:
        """Return the principal of a token.

        Raises:
            CredentialRefused: it is not valid now.
            Problem: 503, the keys to check it with cannot be fetched.
        """
        if len(token) > MAX_LENGTH:
            raise CredentialRefused("malformed", f"the token has {len(token)} characters, {MAX_LENGTH} are allowed")
        algorithm, kid = _header(token)
        keys = self._fitting(self._keys, algorithm, kid)
        if not keys and self._published is not None:
            keys = self._fitting(await self._published.keys(kid), algorithm, kid)
        if not keys:
            raise CredentialRefused("key", "the token is not signed with a known key")
        return principal_from(self._claims(token, algorithm, keys[:KEYS_TRIED]), self._policy)

    async def close(self) -> None:
        """Stop background work."""
        if self._published is not None:
            await self._published.close()

    @staticmethod
    def _fitting(keys: Sequence[VerifyingKey], algorithm: str, kid: str | None) -> list[VerifyingKey]:
        return [k for k in keys if k.algorithm == algorithm and (kid is None or k.kid is None or k.kid == kid)]

    def _claims(self, token: str, algorithm: str, keys: Sequence[VerifyingKey]) -> dict[str, Any]:
        policy = self._policy
        for key in keys:
            try:
                return jwt.decode(
                    token,
                    key.key,
                    algorithms=[algorithm],
                    audience=policy.audience,
                    issuer=policy.issuer,
                    leeway=policy.leeway,
                    options=self._options,
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.PyJWTError as error:
                raise _refusal(error) from None  # the cause may quote the token
            except (ValueError, TypeError, OverflowError):
                raise CredentialRefused("malformed", "the token is not readable") from None
        raise CredentialRefused("signature", "the token's signature is not valid")


def _header(token: str) -> tuple[str, str | None]:
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise CredentialRefused("malformed", "the credentials are neither an API key nor a JSON web token") from None
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in ALGORITHMS:
        raise CredentialRefused("algorithm", f"the token's algorithm is none of {', '.join(ALGORITHMS)}")
    return str(algorithm), kid if isinstance(kid, str) else None


def _refusal(error: jwt.PyJWTError) -> CredentialRefused:
    match error:
        case jwt.ExpiredSignatureError():
            return CredentialRefused("expired", "the token has expired")
        case jwt.ImmatureSignatureError():
            return CredentialRefused("immature", "the token is not valid yet")
        case jwt.InvalidAudienceError():
            return CredentialRefused("audience", "the token is for another audience")
        case jwt.InvalidIssuerError():
            return CredentialRefused("issuer", "the token is from another issuer")
        case jwt.MissingRequiredClaimError():
            return CredentialRefused("claims", f"the token lacks the claim {error.claim!r}")
        case _:
            return CredentialRefused("malformed", "the token is not valid")
