"""Test JSON web tokens: valid ones, and every kind of forged or invalid one."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.kit.auth.jwt_verifier import (
    ALGORITHMS,
    CredentialRefused,
    JwtPolicy,
    JwtVerifier,
    VerifyingKey,
    jwk_keys,
    pem_key,
    principal_from,
    secret_key,
)

SECRET = b"a-secret-of-more-than-thirty-two-bytes-for-tests"
RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
POLICY = JwtPolicy(audience="tailrace", issuer="https://issuer.test")


def pem(private: Any) -> bytes:
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


SIGNERS: dict[str, tuple[Any, VerifyingKey]] = {
    "HS256": (SECRET, secret_key(SECRET)),
    "RS256": (RSA, pem_key(pem(RSA))),
    "ES256": (EC, pem_key(pem(EC))),
    "EdDSA": (ED, pem_key(pem(ED))),
}


def claims(**changes: Any) -> dict[str, Any]:
    now = time.time()
    made = {
        "aud": "tailrace",
        "iss": "https://issuer.test",
        "sub": "web",
        "tenant": "acme",
        "scope": "read start openid",
        "iat": now,
        "exp": now + 600,
    } | changes
    return {name: value for name, value in made.items() if value is not None}


def token(algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), SIGNERS[algorithm][0], algorithm=algorithm, headers=headers)


def verifier(*algorithms: str, policy: JwtPolicy = POLICY) -> JwtVerifier:
    return JwtVerifier(policy, [SIGNERS[name][1] for name in algorithms or ALGORITHMS])


def encoded(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def forged(header: dict[str, Any], body: dict[str, Any], secret: bytes) -> str:
    """A token made by hand, as the library refuses to make it."""
    signed = f"{encoded(header)}.{encoded(body)}"
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


async def reason(made: str, by: JwtVerifier | None = None) -> str:
    with pytest.raises(CredentialRefused) as refused:
        await (by or verifier()).verify(made)
    assert not any(part in str(refused.value) for part in made.split(".") if len(part) > 8)
    return refused.value.reason


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_signed_token_grants_its_tenant_scopes_and_sessions(algorithm: str) -> None:
    principal = await verifier().verify(token(algorithm, sessions="chat-* docs"))
    assert principal.tenant == "acme"
    assert principal.key == "jwt:web"
    assert principal.scopes == {"read", "start"}
    assert principal.sessions == ("chat-*", "docs")
    assert principal.expires_at == pytest.approx(time.time() + 600, abs=30)
    assert principal.reaches("chat-1")
    assert not principal.reaches("mail")


async def test_a_token_without_scopes_may_do_nothing_and_reaches_all_sessions() -> None:
    principal = await verifier().verify(token(scope=None))
    assert principal.scopes == frozenset()
    assert principal.reaches_all


@pytest.mark.parametrize("scope", ["read cancel", ["read", "cancel"]])
async def test_scopes_may_be_text_or_a_list(scope: Any) -> None:
    assert (await verifier().verify(token(scope=scope))).scopes == {"read", "cancel"}
    assert (await verifier().verify(token(scope=None, scopes=scope))).scopes == {"read", "cancel"}


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "HS384", "HS512", "RS384", "PS256", "ES384", ""])
async def test_no_other_algorithm_is_tried(algorithm: str) -> None:
    unsigned = f"{encoded({'alg': algorithm, 'typ': 'JWT'})}.{encoded(claims())}."
    assert await reason(unsigned) in ("algorithm", "malformed")
    assert await reason(forged({"alg": algorithm}, claims(), SECRET)) in ("algorithm", "malformed")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_public_key_never_serves_as_the_secret_of_an_hmac(algorithm: str) -> None:
    private, _ = SIGNERS[algorithm]
    made = forged({"alg": "HS256", "typ": "JWT"}, claims(), pem(private))
    assert await reason(made, verifier(algorithm)) == "key"
    assert await reason(made, verifier(algorithm, "HS256")) == "signature"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_an_algorithm_without_a_key_of_its_own_is_refused(algorithm: str) -> None:
    others = [name for name in ALGORITHMS if name != algorithm]
    assert await reason(token(algorithm), verifier(*others)) == "key"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_changed_token_is_refused(algorithm: str) -> None:
    head, _, tail = token(algorithm).split(".")
    assert await reason(f"{head}.{encoded(claims(tenant='rival'))}.{tail}") == "signature"
    assert await reason(f"{head}.{encoded(claims())}.") in ("signature", "malformed")


async def test_a_token_signed_by_an_unknown_key_is_refused() -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    assert await reason(jwt.encode(claims(), other, algorithm="EdDSA")) == "signature"


async def test_keys_embedded_in_a_token_are_not_used() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    own = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(other.public_key()))
    headers = {"jwk": own, "jku": "https://evil.test/keys", "x5u": "https://evil.test/cert", "kid": "../../dev/null"}
    assert await reason(jwt.encode(claims(), other, algorithm="ES256", headers=headers)) == "signature"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exp": time.time() - 3_600}, "expired"),
        ({"exp": None}, "claims"),
        ({"exp": "never"}, "malformed"),
        ({"nbf": time.time() + 3_600}, "immature"),
        ({"iat": time.time() + 3_600}, "immature"),
        ({"aud": "another"}, "audience"),
        ({"aud": None}, "claims"),
        ({"iss": "https://evil.test"}, "issuer"),
        ({"iss": None}, "claims"),
        ({"tenant": None}, "claims"),
        ({"tenant": "a.b"}, "claims"),
        ({"tenant": "*"}, "claims"),
        ({"tenant": ">"}, "claims"),
        ({"tenant": "acme\n"}, "claims"),
        ({"tenant": ["acme"]}, "claims"),
        ({"tenant": 7}, "claims"),
        ({"sessions": []}, "claims"),
        ({"sessions": {"a": 1}}, "claims"),
        ({"sessions": ["a[b]"]}, "claims"),
        ({"sessions": ["x" * 65]}, "claims"),
        ({"sessions": [f"s{n}" for n in range(101)]}, "claims"),
        ({"scope": 5}, "claims"),
        ({"sub": 5}, "malformed"),
    ],
)
async def test_claims_that_are_wrong_or_missing_are_refused(changes: dict[str, Any], expected: str) -> None:
    assert await reason(token(**changes)) == expected


async def test_clocks_may_differ_by_the_leeway() -> None:
    await verifier().verify(token(exp=time.time() - 5))
    strict = JwtPolicy(audience="tailrace", issuer="https://issuer.test", leeway=0)
    assert await reason(token(exp=time.time() - 5), verifier(policy=strict)) == "expired"


@pytest.mark.parametrize(
    "garbage",
    ["", ".", "..", "...", "a.b.c", "x" * 100, "eyJ.eyJ.", "\u00e9.\u00e9.\u00e9", f"{encoded([])}.{encoded([])}.x"],
)
async def test_garbage_is_refused(garbage: str) -> None:
    assert await reason(garbage) in ("malformed", "algorithm")


async def test_deeply_nested_json_is_refused() -> None:
    deep = base64.urlsafe_b64encode(b"[" * 4_000).rstrip(b"=").decode()
    assert await reason(f"{deep}.{encoded({})}.x") in ("malformed", "algorithm")


async def test_a_token_of_excessive_length_is_not_even_read() -> None:
    assert await reason(token(filler="x" * 9_000)) == "malformed"


async def test_a_token_with_an_unknown_critical_header_is_refused() -> None:
    assert await reason(token(headers={"crit": ["exp2"], "exp2": 1})) == "malformed"


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="32 or more"):
        secret_key(b"short")


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(public_exponent=65_537, key_size=1_024),
        ec.generate_private_key(ec.SECP384R1()),
    ],
)
def test_weak_or_other_kinds_of_keys_are_refused(key: Any) -> None:
    with pytest.raises(ValueError, match="RSA"):
        pem_key(pem(key))


def test_a_private_key_is_refused_as_public_key() -> None:
    text = EC.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(ValueError):
        pem_key(text)


def test_only_public_signature_keys_of_a_key_set_are_used() -> None:
    good = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC.public_key())) | {"kid": "good"}
    document = {
        "keys": [
            good,
            good | {"kid": "for encryption", "use": "enc"},
            {"kty": "oct", "k": base64.urlsafe_b64encode(SECRET).decode(), "alg": "HS256", "kid": "secret"},
            json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key())) | {"kid": "hmac", "alg": "HS256"},
            json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key())) | {"kid": "other", "alg": "RS512"},
            {"kty": "EC"},
            {"kty": "unheard of"},
            {},
            "text",
        ]
    }
    assert [(key.algorithm, key.kid) for key in jwk_keys(document)] == [("ES256", "good")]


@pytest.mark.parametrize("document", [{}, {"keys": {}}, {"keys": "x"}])
def test_a_document_that_is_no_key_set_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="keys"):
        jwk_keys(document)


def test_the_repr_of_a_verifying_key_hides_the_key() -> None:
    assert SECRET.decode() not in repr(secret_key(SECRET))


def test_the_tenant_claim_is_configurable() -> None:
    policy = JwtPolicy(audience="tailrace", tenant_claim="https://claims.test/org")
    found = principal_from({"https://claims.test/org": "globex", "tenant": "acme", "exp": 5, "sub": "x"}, policy)
    assert found.tenant == "globex"
