"""Test that refusals of expired credentials are no violation and all other refusals are."""

from pathlib import Path

import pytest

from bench.chaos.credentials import Credentials


@pytest.mark.parametrize(
    ("seconds", "status", "body", "excused"),
    [
        (6.0, 401, b'{"detail":"the token has expired"}', True),
        (6.0, 401, b'{"detail":"the token is not valid"}', False),
        (6.0, 403, b'{"detail":"the token has expired"}', False),
        (None, 401, b'{"detail":"the token has expired"}', False),
    ],
)
def test_only_an_expiry_is_excused(
    tmp_path: Path, seconds: float | None, status: int, body: bytes, excused: bool
) -> None:
    assert Credentials(tmp_path, seconds).has_expired(status, body) is excused
