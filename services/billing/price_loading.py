"""Load price files from disk into the price book."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from services.billing.adapters.prices import FILE, Change, Prices
from services.billing.core.price_file import BadPrices, parse_csv, parse_json, parse_toml
from services.billing.core.prices import Price
from services.kit.clock import Clock
from services.kit.settings import SettingsError

__all__ = ["FORMATS", "SHIPPED_FILE", "load_price_file", "load_shipped_prices", "parse_prices", "read_price_file"]

log = structlog.get_logger()
SHIPPED_FILE: Final = Path(__file__).parent / "shipped_prices.toml"
FORMATS: Final[dict[str, Callable[[str], list[Price]]]] = {"toml": parse_toml, "csv": parse_csv}


def parse_prices(kind: str, data: bytes) -> list[Price]:
    """Parse a price file of kind ``toml``, ``csv`` or ``json``.

    Raises:
        BadPrices: it has faults; all of them.
    """
    if kind == "json":
        return parse_json(data)
    try:
        return FORMATS[kind](data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadPrices.single(line, "not UTF-8") from error


def read_price_file(path: Path) -> tuple[list[Price], str]:
    """Read a price file, whose suffix gives its kind; return its rows and the digest of its content.

    Raises:
        SettingsError: it cannot be read, or has faults; all of them with their lines.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS and kind != "json":
        raise SettingsError([f"TAILRACE_BILLING_PRICES: {path.name} is not a .toml, .csv or .json file"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError([f"TAILRACE_BILLING_PRICES: cannot read {path}: {error.strerror}"]) from error
    try:
        return parse_prices(kind, data), hashlib.sha256(data).hexdigest()
    except BadPrices as error:
        raise SettingsError(
            [f"TAILRACE_BILLING_PRICES: {path.name} line {f.line}: {f.message}" for f in error.faults]
        ) from error


async def load_price_file(prices: Prices, path: Path, clock: Clock) -> Change | None:
    """Make a file the price book and return the change, or None if its content is that of the last file loaded.

    So a book uploaded over HTTP since then survives a restart.

    Raises:
        SettingsError: the file cannot be used.
        LedgerUnavailable: the database did not answer.
    """
    rows, digest = read_price_file(path)
    if await prices.last_digest(FILE) == digest:
        return None
    change = await prices.put(rows, source=FILE, digest=digest, now=round(clock.wall() * 1_000))
    log.info("price file loaded", added=change.added, withdrawn=change.withdrawn, revision=change.revision)
    return change


async def load_shipped_prices(prices: Prices, clock: Clock, *, wanted: bool) -> Change | None:
    """Make the shipped prices the price book or, without ``wanted``, withdraw them; return the change.

    A price book uploaded over HTTP or loaded from the user's own file is unchanged; then return None.

    Raises:
        LedgerUnavailable: the database did not answer.
    """
    rows, digest = read_price_file(SHIPPED_FILE) if wanted else ([], "")
    change = await prices.ship(rows, digest=digest, now=round(clock.wall() * 1_000))
    if change is not None and (change.added or change.withdrawn):
        log.info("shipped prices loaded", added=change.added, withdrawn=change.withdrawn, revision=change.revision)
    return change
