"""Short-lived credentials, new for every connection."""

import secrets
import time
from pathlib import Path
from typing import Final

import jwt

__all__ = ["Credentials"]

SCOPES: Final = "start read cancel consume usage admin"


class Credentials:
    """JSON web tokens that are valid for ``seconds``; ``None``: no credentials."""

    def __init__(self, folder: Path, seconds: float | None) -> None:
        self.seconds = seconds
        self._secret = secrets.token_hex(32)
        self.file = folder / "jwt-secret"
        if seconds is not None:
            self.file.write_text(self._secret)

    def settings(self) -> dict[str, str]:
        """Return the services' settings for these credentials."""
        if self.seconds is None:
            return {}
        return {"TAILRACE_AUTH": "required", "TAILRACE_JWT_SECRET_FILE": str(self.file), "TAILRACE_JWT_LEEWAY": "0"}

    def headers(self, *, lasting: bool = False) -> dict[str, str]:
        """Return the headers of a request made now; ``lasting``: for a request that waits long."""
        if self.seconds is None:
            return {}
        claims = {
            "aud": "tailrace",
            "sub": "chaos",
            "tenant": "default",
            "scope": SCOPES,
            "exp": time.time() + (3_600 if lasting else self.seconds),
        }
        return {"Authorization": f"Bearer {jwt.encode(claims, self._secret, algorithm='HS256')}"}

    def has_expired(self, status: int, body: bytes) -> bool:
        """Return whether a response reports credentials that expired under way, as may happen at a paused replica."""
        return status == 401 and self.seconds is not None and b"has expired" in body
