"""A token issuer's public keys: fetched, cached, and fetched again when a token names an unknown one."""

import asyncio
import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import structlog

from services.kit.auth import metrics
from services.kit.auth.jwt_verifier import VerifyingKey, jwk_keys
from services.kit.clock import Clock
from services.kit.loopback import is_loopback
from services.kit.problem import Problem
from services.kit.shutdown import end

__all__ = ["KeySet", "check_jwks_url"]

log = structlog.get_logger()
FRESH_SECONDS: Final = 600.0
UNKNOWN_SECONDS: Final = 10.0  # shortest time between two fetches, whatever keys tokens name
STALE_SECONDS: Final = 86_400.0  # keys are used for this long while the issuer cannot be reached
FETCH_SECONDS: Final = 5.0
MAX_BYTES: Final = 262_144


def check_jwks_url(url: str) -> str:
    """Validate the URL of a key set.

    Raises:
        ValueError: it is not ``https://``, nor ``http://`` on loopback: a forged key set would admit any caller.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname and is_loopback(parts.hostname):
        return url
    raise ValueError("must be an https:// address (http:// only on loopback)")


class KeySet:
    """The key set at a URL. Fetched on first use, and again after ten minutes or for an unknown key.

    At most one fetch runs at a time, and at most one begins in ``unknown_seconds``. If the issuer does not answer, the
    cached keys are used for a day.
    """

    def __init__(self, url: str, clock: Clock, *, unknown_seconds: float = UNKNOWN_SECONDS) -> None:
        self._url = url
        self._clock = clock
        self._unknown_seconds = unknown_seconds
        self._keys: Sequence[VerifyingKey] = ()
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None

    async def keys(self, kid: str | None) -> Sequence[VerifyingKey]:
        """Return the keys; fetch them first if ``kid`` is unknown and the last fetch is not too recent.

        Raises:
            Problem: 503, they could not be fetched yet, or not for a day.
        """
        now = self._clock.monotonic()
        age = None if self._fetched_at is None else now - self._fetched_at
        known = kid is None or any(key.kid in (None, kid) for key in self._keys)
        if age is None or not known:
            await self._fetch_unless_tried(now)
        elif age > FRESH_SECONDS:
            self._begin(now)  # use stale keys during the fetch
        if self._fetched_at is None or self._clock.monotonic() - self._fetched_at > STALE_SECONDS:
            raise Problem(
                503, "the keys to check tokens with cannot be fetched", headers={"Retry-After": str(int(FETCH_SECONDS))}
            )
        return self._keys

    async def close(self) -> None:
        """Cancel a running fetch."""
        if self._fetching is not None:
            await end(self._fetching)

    async def _fetch_unless_tried(self, now: float) -> None:
        task = self._begin(now)
        if task is not None:
            await asyncio.shield(task)

    def _begin(self, now: float) -> asyncio.Task[None] | None:
        """Return the running fetch, or begin one unless the last one began too recently."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if self._tried_at is not None and now - self._tried_at < self._unknown_seconds:
            return None
        self._tried_at = now
        self._fetching = asyncio.create_task(self._fetch(), name="jwks")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            keys = jwk_keys(json.loads(await self._read()))
            if not keys:
                raise ValueError("the key set has no key that can be used")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError, AttributeError) as error:
            metrics.JWKS_FETCHES.labels("failed").inc()
            log.warning(
                "key set not fetched", host=urlsplit(self._url).hostname, detail=f"{type(error).__name__}: {error}"
            )
            return
        metrics.JWKS_FETCHES.labels("ok").inc()
        self._keys, self._fetched_at = keys, self._clock.monotonic()

    async def _read(self) -> bytes:
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(self._url, allow_redirects=False, headers={"Accept": "application/json"}) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"the issuer answered {answer.status}")
            body = await answer.content.read(MAX_BYTES + 1)
            while len(body) <= MAX_BYTES and (more := await answer.content.read(MAX_BYTES + 1 - len(body))):
                body += more
            if len(body) > MAX_BYTES:
                raise ValueError(f"the key set is larger than {MAX_BYTES} bytes")
            return body
