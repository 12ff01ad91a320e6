"""Billing commands: ``tailrace usage``, ``ledger``, ``reconcile``, ``statement``, ``prices`` and ``budget``."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from schemas.names import InvalidName, check_name
from services.standalone.billing_api import BillingApi, given
from services.standalone.errors import EXIT_OK, CommandFailed
from services.standalone.tables import columns_of, print_table
from services.standalone.terminal import Terminal, pretty

__all__ = ["COMMANDS"]

F = TypeVar("F", bound=Callable[..., Any])
_MEDIA: Final = {".toml": "application/toml", ".csv": "text/csv", ".json": "application/json"}
_DIMENSIONS: Final = ("tenant", "session", "model", "provider", "key", "status", "month", "day", "hour")
_billing_url = click.option(
    "--billing-url",
    envvar="TAILRACE_BILLING_URL",
    default="http://127.0.0.1:8081",
    show_default=True,
    help="Address of billing.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_csv = click.option("--csv", "as_csv", is_flag=True, help="Print CSV for spreadsheets.")
_from = click.option("--from", "from_", metavar="TIME", help="Start of the period (ISO 8601), inclusive.")
_to = click.option("--to", metavar="TIME", help="End of the period (ISO 8601), exclusive.")
_limit = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Largest number of rows."
)


def _named(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    try:
        return value if value is None else check_name(str(param.name), value)
    except InvalidName as error:
        raise click.BadParameter(str(error)) from error


def _one_form(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")


def _dimension(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    for name in value.split(","):
        if name.strip() not in _DIMENSIONS and not name.strip().startswith("label:"):
            raise click.BadParameter(f"{name!r} is not one of {', '.join(_DIMENSIONS)}, label:<name>")
    return value


@click.command()
@click.argument("session", callback=_named, required=False)
@click.option(
    "--by", default="model", show_default=True, callback=_dimension, help="Dimensions to sum by, without SESSION."
)
@_from
@_to
@click.option("--key", help="Only usage of this credential.")
@click.option("--label", metavar="NAME=VALUE", help="Only usage with this label.")
@_json
@_csv
@_billing_url
def usage(
    *,
    session: str | None,
    by: str,
    from_: str | None,
    to: str | None,
    key: str | None,
    label: str | None,
    as_json: bool,
    as_csv: bool,
    billing_url: str,
) -> int:
    """Show the usage of SESSION by generation, or sums by model or as in --by, such as month,key or label:team."""
    _one_form(as_json, as_csv)
    terminal = Terminal()
    query = {"group_by": by, "from": from_, "to": to, "key": key, "label": label}
    with BillingApi(billing_url) as api:
        if as_csv and session is None:
            return _lines(terminal, api.csv_pages("/v1/usage", query, 100_000))
        if as_csv:
            return _lines(terminal, api.csv_pages("/v1/reconciliations", {"session": session}, 100_000))
        report = api.get(f"/v1/usage/sessions/{session}", {}) if session else api.get("/v1/usage", query)
    if as_json:
        return _show_json(terminal, report)
    rows = [_group(row) for row in report.get("rows", [])] or [_generation(g) for g in report.get("generations", [])]
    _table(terminal, rows, "no usage")
    if rows and (totals := report.get("totals")):
        terminal.remark("total: " + _total_line(totals))
    if report.get("next"):
        terminal.remark("more rows exist: restrict the period with --from and --to, or use --csv")
    return EXIT_OK


@click.command()
@_from
@_to
@click.option("--session", callback=_named, help="Only entries of this session.")
@click.option("--generation", callback=_named, help="Only entries of this generation.")
@click.option("--kind", type=click.Choice(["charge", "correction", "reversal"]), help="Only entries of this kind.")
@_limit
@_json
@_csv
@_billing_url
def ledger(*, from_: str | None, limit: int, as_json: bool, as_csv: bool, billing_url: str, **exact: Any) -> int:
    """List the ledger's entries, oldest first."""
    query = {"from": from_, **exact}
    columns = ("created_at", "session", "generation", "kind", "amount", "currency", "source", "rule")
    return _listed("/v1/ledger", "entries", query, limit, billing_url, as_json, as_csv, lambda r: _only(r, columns))


@click.group(invoke_without_command=True)
@click.pass_context
@click.option(
    "--status",
    type=click.Choice(["running", "matched", "drift", "awaiting_provider", "provider_missing", "partial"]),
    help="Only generations with this status.",
)
@click.option(
    "--pricing",
    type=click.Choice(["pending", "charged", "unpriced", "waived"]),
    help="Only generations with this state of pricing.",
)
@_from
@_to
@click.option("--model", help="Only generations of this model.")
@_limit
@_json
@_csv
@_billing_url
def reconcile(
    ctx: click.Context, /, *, from_: str | None, limit: int, as_json: bool, as_csv: bool, billing_url: str, **exact: Any
) -> int:
    """List generations with counted and reported tokens and charges; `import` reads a provider's export."""
    if ctx.invoked_subcommand is not None:
        return EXIT_OK
    query = {"from": from_, **exact}
    return _listed("/v1/reconciliations", "generations", query, limit, billing_url, as_json, as_csv, _generation)


@reconcile.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--provider", default="", help="Provider of rows that do not name one.")
@click.option("--dry-run", is_flag=True, help="Report the changes without making them.")
@_billing_url
def import_(file: Path, provider: str, dry_run: bool, billing_url: str) -> int:
    """Import FILE (.csv or .json), a provider's export of the usage of generations."""
    query = {"provider": provider, "dry_run": str(dry_run).lower()}
    with BillingApi(billing_url) as api:
        done = api.send("POST", "/v1/provider-usage", params=query, **_content(file, (".csv", ".json")))
    return _show_json(Terminal(), done)


@click.command()
@click.argument("month", metavar="YYYY-MM")
@_json
@_csv
@click.option("--html", "as_html", is_flag=True, help="Print a printable HTML page.")
@_billing_url
def statement(*, month: str, as_json: bool, as_csv: bool, as_html: bool, billing_url: str) -> int:
    """Show the usage and charges of a month."""
    if as_json + as_csv + as_html > 1:
        raise click.UsageError("--json, --csv and --html exclude each other")
    terminal = Terminal()
    with BillingApi(billing_url) as api:
        if as_csv or as_html:
            text = api.text(f"/v1/statements/{month}", {}, "text/html" if as_html else "text/csv").text
            return _lines(terminal, text.splitlines())
        made = api.get(f"/v1/statements/{month}", {})
    if as_json:
        return _show_json(terminal, made)
    rows = [{n: line[n] for n in ("provider", "model", "status")} | _totals(line["totals"]) for line in made["lines"]]
    _table(terminal, rows, f"no usage in {month}")
    unpriced = sum(line["totals"].get("unpriced", 0) for line in made["lines"])
    terminal.remark(f"total: {_amounts(made['amounts'], unpriced)}" + ("" if made["final"] else "; not final"))
    return EXIT_OK


@click.group(invoke_without_command=True)
@click.pass_context
@_json
@_csv
@_billing_url
def prices(ctx: click.Context, as_json: bool, as_csv: bool, billing_url: str) -> int:
    """Show the price book; `put` replaces it."""
    if ctx.invoked_subcommand is not None:
        return EXIT_OK
    _one_form(as_json, as_csv)
    terminal = Terminal()
    with BillingApi(billing_url) as api:
        if as_csv:
            return _lines(terminal, api.text("/v1/prices", {}).text.splitlines())
        book = api.get("/v1/prices", {})
    if as_json:
        return _show_json(terminal, book)
    names = ("provider", "model", "class", "amount", "currency", "from", "until")
    return _table(terminal, [_only(row, names) for row in book["prices"]], "the price book is empty")


@prices.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Report the changes without making them.")
@_billing_url
def put(file: Path, dry_run: bool, billing_url: str) -> int:
    """Replace the price book with FILE (.toml, .csv or .json)."""
    with BillingApi(billing_url) as api:
        done = api.send("PUT", "/v1/prices", params={"dry_run": str(dry_run).lower()}, **_content(file, tuple(_MEDIA)))
    return _show_json(Terminal(), done)


@click.group(invoke_without_command=True)
@click.pass_context
@_json
@_billing_url
def budget(ctx: click.Context, as_json: bool, billing_url: str) -> int:
    """List budgets with their spending; `set` and `remove` change them."""
    if ctx.invoked_subcommand is not None:
        return EXIT_OK
    terminal = Terminal()
    with BillingApi(billing_url) as api:
        report = api.get("/v1/budgets", {})
    if as_json:
        return _show_json(terminal, report)
    return _budgets(terminal, report["budgets"])


@budget.command("set")
@click.argument("name", callback=_named)
@click.option("--period", type=click.Choice(["day", "month"]), default="month", show_default=True)
@click.option("--unit", default="USD", show_default=True, help="A currency, or tokens.")
@click.option("--soft", help="Soft limit: passing it logs a warning.")
@click.option("--hard", help="Hard limit: generations that could pass it are refused.")
@click.option("--key", default="", help="Only for the usage of this credential.")
@_json
@_billing_url
def set_(*, name: str, as_json: bool, billing_url: str, **spec: Any) -> int:
    """Set the budget NAME, and show its spending."""
    with BillingApi(billing_url) as api:
        made = api.send("PUT", f"/v1/budgets/{name}", json=given(spec))
    return _show_json(Terminal(), made) if as_json else _budgets(Terminal(), [made])


@budget.command()
@click.argument("name", callback=_named)
@_billing_url
def remove(name: str, billing_url: str) -> int:
    """Remove the budget NAME."""
    with BillingApi(billing_url) as api:
        api.remove(f"/v1/budgets/{name}")
    Terminal().remark(f"budget {name} is removed")
    return EXIT_OK


def _budgets(terminal: Terminal, rows: list[dict[str, Any]]) -> int:
    names = ("name", "period", "unit", "key", "soft", "hard", "spent", "reserved", "left")
    return _table(terminal, [_only(row, names) for row in rows], "no budgets")


def _listed(
    path: str,
    name: str,
    query: Mapping[str, Any],
    limit: int,
    url: str,
    as_json: bool,
    as_csv: bool,
    cells: Callable[[dict[str, Any]], dict[str, Any]],
) -> int:
    _one_form(as_json, as_csv)
    terminal = Terminal()
    with BillingApi(url) as api:
        if as_csv:
            return _lines(terminal, api.csv_pages(path, query, limit))
        rows = api.pages(path, query, name, limit)
    if as_json:
        return _show_json(terminal, {name: rows})
    return _table(terminal, [cells(row) for row in rows], "no matching rows")


def _content(file: Path, allowed: tuple[str, ...]) -> dict[str, Any]:
    media = _MEDIA.get(file.suffix.lower())
    if file.suffix.lower() not in allowed or media is None:
        raise click.UsageError(f"{file.name}: the file name must end in {' or '.join(allowed)}")
    try:
        return {"content": file.read_bytes(), "headers": {"content-type": media}}
    except OSError as error:
        raise CommandFailed(f"{file} cannot be read: {error.strerror}") from error


def _show_json(terminal: Terminal, document: Any) -> int:
    terminal.show(pretty(document))
    return EXIT_OK


def _lines(terminal: Terminal, lines: Iterable[str]) -> int:
    for line in lines:
        terminal.show(line)
    return EXIT_OK


def _table(terminal: Terminal, rows: list[dict[str, Any]], remark_if_empty: str) -> int:
    if not rows:
        terminal.remark(remark_if_empty)
        return EXIT_OK
    columns = columns_of(rows)
    print_table(terminal, [_words(c) for c in columns], [[row.get(name) for name in columns] for row in rows])
    return EXIT_OK


def _only(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names}


def _group(row: dict[str, Any]) -> dict[str, Any]:
    key: dict[str, Any] = row["key"]
    return key | _totals(row["totals"])


def _totals(totals: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(value) if isinstance(value, dict) else value for name, value in totals.items()}


def _generation(record: dict[str, Any]) -> dict[str, Any]:
    counted, reported, charge = record["counted"], record["reported"] or {}, record.get("charge") or {}
    return {
        "generation": record["generation"],
        "model": record["model"],
        "state": record["state"],
        "status": record["status"],
        "counted_input": counted["input"],
        "counted_output": counted["output"],
        "input": reported.get("input"),
        "output": reported.get("output"),
        "reasons": " ".join(record.get("reasons") or []),
        "charge": charge.get("status"),
        "amount": f"{charge.get('amount', '')} {charge.get('currency') or ''}".strip(),
    }


def _total_line(totals: dict[str, Any]) -> str:
    """Return the totals as one line: tokens used, then amounts."""
    used = [f"{_words(name)} {_value(value)}" for name, value in totals.items() if not isinstance(value, dict)]
    return ", ".join([*used, f"amount {_amounts(totals.get('amounts') or {}, totals.get('unpriced', 0))}"])


def _amounts(amounts: dict[str, Any], unpriced: int) -> str:
    """Return the amounts, and the number of unpriced generations that they leave out."""
    missing = f"{unpriced:,} generation{'' if unpriced == 1 else 's'} without a price (see: tailrace prices)"
    if not unpriced:
        return _value(amounts) or "nothing"
    return f"{_value(amounts)}, and {missing}" if amounts else f"unknown, {missing}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {currency}" for currency, amount in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


COMMANDS: Final = (usage, ledger, reconcile, statement, prices, budget)
