"""Test key sets over real HTTP: fetching, rotation, and an issuer that is unreachable or sends invalid responses."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bench.processes import free_port
from services.kit.auth.jwks import STALE_SECONDS, KeySet, check_jwks_url
from services.kit.auth.jwt_verifier import CredentialRefused, JwtPolicy, JwtVerifier
from services.kit.problem import Problem
from tests.conftest import eventually

POLICY = JwtPolicy(audience="tailrace", issuer="https://issuer.test")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return self.now


class Issuer:
    """Publishes keys and signs tokens with them."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/keys"
        self.keys: dict[str, Any] = {}
        self.fetches = 0
        self.answer: web.Response | None = None
        self.pause = 0.0
        self._runner: web.AppRunner | None = None

    def add(self, kid: str, key: Any) -> None:
        self.keys[kid] = key

    def sign(self, kid: str, **claims: Any) -> str:
        key = self.keys[kid]
        made = {"aud": "tailrace", "iss": "https://issuer.test", "tenant": "acme", "exp": time.time() + 600} | claims
        return jwt.encode(made, key, algorithm=_algorithm(key)[0], headers={"kid": kid})

    def document(self) -> dict[str, Any]:
        return {
            "keys": [
                json.loads(_algorithm(key)[1].to_jwk(key.public_key())) | {"kid": kid} for kid, key in self.keys.items()
            ]
        }

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/keys", self._publish)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _publish(self, _request: web.Request) -> web.StreamResponse:
        self.fetches += 1
        await asyncio.sleep(self.pause)
        return self.answer or web.json_response(self.document())


def _algorithm(key: Any) -> tuple[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256", jwt.algorithms.RSAAlgorithm
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return "ES256", jwt.algorithms.ECAlgorithm
    return "EdDSA", jwt.algorithms.OKPAlgorithm


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    running = Issuer()
    running.add("first", ec.generate_private_key(ec.SECP256R1()))
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def verifier(issuer: Issuer, clock: Clock) -> AsyncIterator[JwtVerifier]:
    made = JwtVerifier(POLICY, (), KeySet(issuer.url, clock))
    yield made
    await made.close()


async def test_keys_are_fetched_once_for_many_tokens(issuer: Issuer, verifier: JwtVerifier) -> None:
    principals = await asyncio.gather(*(verifier.verify(issuer.sign("first", sub=f"u{n}")) for n in range(20)))
    assert {p.tenant for p in principals} == {"acme"}
    assert issuer.fetches == 1


async def test_keys_of_every_kind_are_used(issuer: Issuer, verifier: JwtVerifier) -> None:
    issuer.add("rsa", rsa.generate_private_key(public_exponent=65_537, key_size=2_048))
    issuer.add("ed", ed25519.Ed25519PrivateKey.generate())
    for kid in issuer.keys:
        assert (await verifier.verify(issuer.sign(kid))).tenant == "acme"


async def test_a_new_key_is_found_when_a_token_names_it(issuer: Issuer, verifier: JwtVerifier, clock: Clock) -> None:
    await verifier.verify(issuer.sign("first"))
    issuer.add("second", ed25519.Ed25519PrivateKey.generate())
    clock.now += 11
    assert (await verifier.verify(issuer.sign("second"))).tenant == "acme"
    assert issuer.fetches == 2


async def test_fetches_for_unknown_keys_are_limited(issuer: Issuer, verifier: JwtVerifier, clock: Clock) -> None:
    await verifier.verify(issuer.sign("first"))
    stranger = Issuer()
    for n in range(30):
        stranger.add(f"k{n}", ec.generate_private_key(ec.SECP256R1()))
        with pytest.raises(CredentialRefused):
            await verifier.verify(stranger.sign(f"k{n}"))
    assert issuer.fetches == 1
    clock.now += 11
    for n in range(30):
        with pytest.raises(CredentialRefused):
            await verifier.verify(stranger.sign(f"k{n}"))
    assert issuer.fetches == 2


async def test_a_withdrawn_key_is_not_used_any_more(issuer: Issuer, verifier: JwtVerifier, clock: Clock) -> None:
    made = issuer.sign("first")
    await verifier.verify(made)
    del issuer.keys["first"]
    issuer.add("second", ec.generate_private_key(ec.SECP256R1()))
    clock.now += 601

    async def refused() -> bool:
        try:
            await verifier.verify(made)
        except CredentialRefused:
            return True
        return False

    await eventually(refused)


async def test_cached_keys_are_used_during_an_issuer_outage_until_they_expire(
    issuer: Issuer, verifier: JwtVerifier, clock: Clock
) -> None:
    made = issuer.sign("first")
    await verifier.verify(made)
    await issuer.stop()
    clock.now += 3_600
    assert (await verifier.verify(made)).tenant == "acme"
    clock.now += STALE_SECONDS
    with pytest.raises(Problem) as refused:
        await verifier.verify(made)
    assert refused.value.status == 503
    await issuer.start()
    clock.now += 11

    async def back() -> bool:
        try:
            return (await verifier.verify(made)).tenant == "acme"
        except Problem:
            return False

    await eventually(back)


async def test_an_issuer_that_never_answered_is_503_and_not_401(issuer: Issuer, verifier: JwtVerifier) -> None:
    made = issuer.sign("first")
    await issuer.stop()
    with pytest.raises(Problem) as refused:
        await verifier.verify(made)
    assert refused.value.status == 503
    assert "Retry-After" in refused.value.headers


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=500),
        web.Response(text="not JSON"),
        web.Response(text="[]"),
        web.Response(text='{"keys": []}'),
        web.Response(text="[" * 100_000),
        web.Response(text='{"keys": [], "x": "' + "x" * 300_000 + '"}'),
        web.Response(status=302, headers={"Location": "http://127.0.0.1:1/keys"}),
    ],
    ids=["500", "text", "list", "empty", "nested", "large", "redirect"],
)
async def test_an_invalid_key_set_response_keeps_the_cached_keys(
    issuer: Issuer, clock: Clock, answer: web.Response
) -> None:
    verifier = JwtVerifier(POLICY, (), KeySet(issuer.url, clock))
    made = issuer.sign("first")
    await verifier.verify(made)
    issuer.answer = answer
    clock.now += 601
    fetched = issuer.fetches
    await verifier.verify(made)
    await eventually(lambda: issuer.fetches > fetched)
    await verifier.verify(made)
    await verifier.close()


async def test_a_fetch_cancelled_by_one_caller_serves_the_others(issuer: Issuer, verifier: JwtVerifier) -> None:
    issuer.pause = 0.2
    first = asyncio.create_task(verifier.verify(issuer.sign("first")))
    second = asyncio.create_task(verifier.verify(issuer.sign("first")))
    await eventually(lambda: issuer.fetches == 1)
    first.cancel()
    assert (await second).tenant == "acme"
    await asyncio.gather(first, return_exceptions=True)


@pytest.mark.parametrize("url", ["http://issuer.test/keys", "ftp://127.0.0.1/x", "file:///etc/passwd", "keys", ""])
def test_insecure_jwks_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        check_jwks_url(url)


@pytest.mark.parametrize("url", ["https://issuer.test/keys", "http://127.0.0.1:8000/keys", "http://localhost/keys"])
def test_secure_jwks_urls_are_accepted(url: str) -> None:
    assert check_jwks_url(url) == url
