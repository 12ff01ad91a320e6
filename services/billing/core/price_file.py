"""Parse price files (TOML, CSV or JSON) into rows, and report every fault with its line.

TOML has a table ``[[price]]`` per model (or list of models) and date, with a key for each token class; CSV and JSON
have one record per price, as `render_rows` writes them.
"""

import csv
import io
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

import msgspec

from services.billing.core.money import parse_price, render
from services.billing.core.prices import CLASSES, Price, PriceKey

__all__ = ["COLUMNS", "BadPrices", "Fault", "parse_csv", "parse_json", "parse_toml", "render_moment", "render_rows"]

COLUMNS: Final = ("provider", "model", "class", "currency", "amount", "from", "until")
MOST_ROWS: Final = 20_000
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_TEXT_LIMIT: Final = 200
_HEADER: Final = re.compile(r"\s*\[\[\s*price\s*\]\]")
_SECTION: Final = re.compile(r"\s*\[")
_decoder: Final = msgspec.json.Decoder(dict[str, list[dict[str, Any]]], float_hook=Decimal)
_ALLOWED: Final = frozenset({"provider", "model", "currency", "from", "until", *CLASSES})


class Fault(NamedTuple):
    """One fault. ``line`` counts from 1; in JSON it is the number of the record."""

    line: int
    message: str


class BadPrices(ValueError):
    """A price file with faults: carries all of them."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = sorted(faults)
        super().__init__("prices are not usable:\n" + "\n".join(f"  line {f.line}: {f.message}" for f in self.faults))

    @classmethod
    def single(cls, line: int, message: str) -> "BadPrices":
        """Return an error with one fault."""
        return cls([Fault(line, message)])


_Say = Callable[[str], None]


class _Row(NamedTuple):
    line: int
    values: Mapping[str, Any]


def parse_toml(text: str) -> list[Price]:
    """Parse a TOML price file into rows.

    Raises:
        BadPrices: it has faults.
    """
    try:
        document = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        line = int(found[1]) if found else max(1, len(text.splitlines()))  # without a position, the end of the document
        raise BadPrices([Fault(line, f"not valid TOML: {error}")]) from error
    faults: list[Fault] = []
    lines = text.splitlines()
    unknown = sorted(set(document) - {"currency", "price"})
    faults += [Fault(_line_of(lines, 0, key), f"no such key: {key[:40]!r}; use [[price]]") for key in unknown]
    tables = document.get("price", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise BadPrices([*faults, Fault(1, "price must be tables: write [[price]]")])
    starts = [i for i, line in enumerate(lines) if _HEADER.match(line)] + [0] * len(tables)
    rows: list[_Row] = []
    for start, table in zip(starts, tables, strict=False):
        line = start + 1
        strange = sorted(set(table) - _ALLOWED)
        faults += [Fault(_line_of(lines, line, k), f"no such key: {k[:40]!r}; classes: {_classes()}") for k in strange]
        shared = {"currency": document.get("currency"), **{k: v for k, v in table.items() if k not in CLASSES}}
        classes = [c for c in CLASSES if c in table]
        if not classes:
            faults.append(Fault(line, f"this table has no price; classes: {_classes()}"))
        models = table["model"] if isinstance(table.get("model"), list) else [table.get("model")]
        if not models:
            faults.append(Fault(_line_of(lines, line, "model"), "model: the list is empty"))
        rows += [
            _Row(_line_of(lines, line, c), {**shared, "model": model, "class": c, "amount": table[c]})
            for model in models
            for c in classes
        ]
    return _checked(rows, faults)


def _classes() -> str:
    return ", ".join(CLASSES)


def _line_of(lines: Sequence[str], start: int, key: str) -> int:
    """Return the line of ``key`` in the table that begins after line ``start``, or the line of the table itself."""
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    for number in range(start, len(lines)):
        if _SECTION.match(lines[number]):
            break
        if pattern.match(lines[number]):
            return number + 1
    return max(1, start)


def parse_csv(text: str) -> list[Price]:
    """Parse a CSV price file with a header line into rows.

    Raises:
        BadPrices: it has faults.
    """
    reader = csv.reader(io.StringIO(text))
    faults: list[Fault] = []
    rows: list[_Row] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        unknown = sorted(set(header) - set(COLUMNS))
        missing = sorted(set(COLUMNS) - {"until"} - set(header))
        if unknown or missing or len(set(header)) != len(header):
            raise BadPrices([Fault(1, f"the header must name {', '.join(COLUMNS)} once each (until may be left out)")])
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                faults.append(Fault(reader.line_num, f"{len(cells)} cells where the header has {len(header)}"))
                continue
            rows.append(_Row(reader.line_num, dict(zip(header, (c.strip() for c in cells), strict=True))))
    except csv.Error as error:
        faults.append(Fault(reader.line_num, f"not valid CSV: {error}"))
    return _checked(rows, faults)


def parse_json(data: bytes) -> list[Price]:
    """Parse ``{"prices": [{…}]}``, with a field for each of `COLUMNS`, into rows; faults count records from 1.

    Raises:
        BadPrices: it has faults.
    """
    try:
        document = _decoder.decode(data)
        records = document["prices"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise BadPrices([Fault(1, f'not {{"prices": [{{…}}]}}: {error}')]) from error
    faults: list[Fault] = []
    rows: list[_Row] = []
    for number, record in enumerate(records, 1):
        unknown = sorted(set(record) - {*COLUMNS, "id"})
        faults += [Fault(number, f"no such field: {name[:40]!r}; use {', '.join(COLUMNS)}") for name in unknown]
        rows.append(_Row(number, record))
    return _checked(rows, faults)


def _checked(rows: Iterable[_Row], faults: list[Fault]) -> list[Price]:
    prices: list[Price] = []
    seen: dict[PriceKey, int] = {}
    for row in rows:
        found: list[Fault] = []
        price = _price(row, found)
        faults += found
        if price is None:
            continue
        if price.key in seen:
            faults.append(Fault(row.line, f"the same provider, model, class and date as in line {seen[price.key]}"))
        seen.setdefault(price.key, row.line)
        prices.append(price)
    if len(prices) > MOST_ROWS:
        faults.append(Fault(1, f"more than {MOST_ROWS} prices"))
    if faults:
        raise BadPrices(faults)
    return prices


def _price(row: _Row, faults: list[Fault]) -> Price | None:
    values = {name: value for name, value in row.values.items() if value not in (None, "")}

    def fault(message: str) -> None:
        faults.append(Fault(row.line, message))

    names = {name: _name(name, values.get(name), fault) for name in ("provider", "model")}
    token_class = values.get("class")
    if token_class not in CLASSES:
        fault(f"class: {str(token_class)[:40]!r} is not one of {_classes()}")
    currency = values.get("currency")
    if not isinstance(currency, str) or not _CURRENCY.fullmatch(currency):
        fault(f"currency: {str(currency)[:40]!r} is not three capital letters such as USD")
    amount = _amount(values.get("amount"), fault)
    start = _moment("from", values.get("from"), fault)
    end = _moment("until", values["until"], fault) if "until" in values else None
    if start is not None and end is not None and end <= start:
        fault("until: it must be after from")
    if faults or start is None or amount is None:
        return None
    return Price(
        provider=names["provider"],
        model=names["model"],
        token_class=values["class"],
        currency=values["currency"],
        amount=amount,
        valid_from=start,
        valid_until=end,
    )


def _name(role: str, value: Any, fault: _Say) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _TEXT_LIMIT or "\0" in value:
        fault(f"{role}: a text of 1 to {_TEXT_LIMIT} characters, in which * and ? are wildcards, is needed")
        return ""
    return value


def _amount(value: Any, fault: _Say) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        fault(f"amount: {str(value)[:40]!r} is not a decimal number such as 2.50")
        return None
    try:
        return parse_price(f"{value:f}" if isinstance(value, Decimal) else str(value))
    except ValueError as error:
        fault(f"amount: {error}")
        return None


def _moment(name: str, value: Any, fault: _Say) -> int | None:
    try:
        moment = value if isinstance(value, date) else _parse_moment(value)
        if not isinstance(moment, datetime):
            moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        return round(moment.timestamp() * 1_000)
    except (ValueError, TypeError, OverflowError):
        fault(f"{name}: {str(value)[:40]!r} is neither a date (2026-01-31) nor a time (2026-01-31T12:00:00Z)")
        return None


def _parse_moment(text: Any) -> date:
    return date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)


def render_moment(milliseconds: int) -> str:
    """Format a time for a price file: a date if it is midnight, UTC."""
    moment = datetime.fromtimestamp(milliseconds / 1_000, UTC)
    if milliseconds % 86_400_000 == 0:
        return moment.strftime("%Y-%m-%d")
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_rows(prices: Iterable[Price]) -> list[dict[str, str]]:
    """Return the rows as records that `parse_json` and `parse_csv` accept."""
    return [
        {
            "provider": p.provider,
            "model": p.model,
            "class": p.token_class,
            "currency": p.currency,
            "amount": render(p.amount),
            "from": render_moment(p.valid_from),
            "until": "" if p.valid_until is None else render_moment(p.valid_until),
        }
        for p in prices
    ]
