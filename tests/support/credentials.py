"""Delivery with required credentials, and callers with keys and tokens."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt

from services.kit.auth.api_keys import mint
from services.kit.settings import Shared
from tests.support.delivery_server import Stage, delivering

ADMIN = mint()
SECRET = "a-shared-secret-of-at-least-thirty-two-bytes"
SCOPES = ("start", "read", "cancel", "consume", "usage", "admin")


def bearer(credential: str) -> dict[str, str]:
    """Return the header for a credential."""
    return {"Authorization": f"Bearer {credential}"}


def token(tenant: str = "acme", *scopes: str, **claims: Any) -> str:
    """Return a signed token."""
    made = {"aud": "tailrace", "tenant": tenant, "scope": " ".join(scopes), "sub": "test", "exp": time.time() + 600}
    return jwt.encode(made | claims, SECRET, algorithm="HS256")


def requiring(url: str, folder: Path, **settings: Any) -> Shared:
    """Return settings with an operator's key and tokens with a shared secret."""
    path = folder / "jwt-secret"
    path.write_text(SECRET + "\n")
    return Shared(
        **{"nats_url": url, "admin_key_hash": f"{ADMIN.id}.{ADMIN.hash}", "jwt_secret_file": str(path)} | settings
    )


@asynccontextmanager
async def guarded(url: str, folder: Path, **settings: Any) -> AsyncIterator[Stage]:
    """Run a delivery that asks for credentials."""
    async with delivering(url, shared=requiring(url, folder), **settings) as stage:
        yield stage


async def make_key(stage: Stage, *scopes: str, by: str = ADMIN.text, **wish: Any) -> dict[str, Any]:
    """Make an API key; return it with its secret."""
    answer = await stage.http.post(f"{stage.url}/v1/keys", json={"scopes": scopes, **wish}, headers=bearer(by))
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def problem(answer: httpx.Response, status: int, slug: str) -> str:
    """Check that an answer is this problem, and return its text."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    body = answer.json()
    assert body["type"] == f"urn:tailrace:problem:{slug}"
    return str(body.get("detail", ""))
