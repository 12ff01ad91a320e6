"""Metrics of credentials, the same in every service."""

from typing import Final

from prometheus_client import Counter, Gauge

REFUSED: Final = Counter("tailrace_auth_refused", "Requests whose credentials were refused, by reason", ["reason"])
KEYS: Final = Gauge("tailrace_auth_keys", "API keys known to this replica")
REVOKED: Final = Counter("tailrace_auth_keys_revoked", "API keys that were revoked while this replica ran")
KEYS_STALE: Final = Gauge(
    "tailrace_auth_keys_age_seconds", "Seconds since the API keys were last compared with the broker"
)
JWKS_FETCHES: Final = Counter("tailrace_auth_jwks_fetches", "Fetches of the key set, by result", ["result"])
