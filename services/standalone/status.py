"""``tailrace status``: show state, version, lag and settings of the services."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from services.standalone.disk import disk_use
from services.standalone.errors import EXIT_FAILED, EXIT_OK, EXIT_UNREACHABLE
from services.standalone.options import data_option, json_option, url_option
from services.standalone.tables import print_table
from services.standalone.terminal import Terminal, pretty

__all__ = ["status"]

_TIMEOUT: Final = httpx.Timeout(5.0, connect=2.0)
_SETTINGS: Final = ("auth", "partitions", "replicas", "retention", "pool")
_FIGURES: Final = {
    "delivery": {
        "tailrace_delivery_subscribers": "subscribers",
        "tailrace_delivery_log_used_ratio": "log used (share of its bound)",
    },
    "billing": {
        "tailrace_billing_consumer_lag_events": "events not yet billed",
        "tailrace_billing_generations_running": "generations not yet settled",
    },
    "producer": {
        "tailrace_producer_active_generations": "generations running",
        "tailrace_producer_slots": "generations at most",
    },
}


class Report(NamedTuple):
    """State and metrics of one service. ``state``: ``ok``, ``not ready``, ``unreachable``, or a description.

    ``failed``: names of the failed readiness checks.
    """

    service: str
    url: str
    state: str
    failed: list[str]
    info: dict[str, str]
    figures: dict[str, float]

    def document(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return self._asdict()


@click.command()
@url_option
@click.option(
    "--billing-url",
    envvar="TAILRACE_BILLING_URL",
    default="http://127.0.0.1:8081",
    show_default=True,
    help="Address of billing.",
)
@click.option(
    "--producer-url", default="http://127.0.0.1:8082", show_default=True, help="Address of the (first) producer."
)
@data_option
@json_option
def status(*, url: str, billing_url: str, producer_url: str, data: Path, as_json: bool) -> int:
    """Show the state of the services: versions, lag, disk, and important settings.

    It queries the services' own ports: an edge proxy hides readiness and metrics. Exit codes: 0 all services are ready,
    1 a service is not ready, 3 no service answers.
    """
    terminal = Terminal()
    addresses = {"delivery": url, "billing": billing_url, "producer": producer_url}
    with httpx.Client(timeout=_TIMEOUT) as client:
        reports = [_report(client, service, address.rstrip("/")) for service, address in addresses.items()]
    disk = disk_use(data)
    if as_json:
        terminal.show(pretty({"services": [r.document() for r in reports], "disk": disk and disk._asdict()}))
    else:
        _show(terminal, reports)
        if disk is not None:
            terminal.show(f"\ndata  {disk.folder}: {disk.text()}")
    if all(report.state == "unreachable" for report in reports):
        return EXIT_UNREACHABLE
    return EXIT_OK if all(report.state == "ok" for report in reports) else EXIT_FAILED


def _show(terminal: Terminal, reports: list[Report]) -> None:
    rows = [
        [r.service, r.state + (f" ({', '.join(r.failed)})" if r.failed else ""), r.info.get("version", ""), r.url]
        for r in reports
    ]
    print_table(terminal, ["service", "state", "version", "address"], rows)
    figures = [(r.service, name, value) for r in reports for name, value in r.figures.items()]
    if figures:
        terminal.show("")
        print_table(terminal, ["service", "figure", "now"], [[s, n, _number(v)] for s, n, v in figures])
    settings = [
        [name, *(r.info[name] for r in reports if name in r.info)] for name in _SETTINGS if _is_reported(name, reports)
    ]
    if settings:
        terminal.show("")
        names = [r.service for r in reports if r.info]
        print_table(terminal, ["setting", *names], settings)


def _is_reported(name: str, reports: Iterable[Report]) -> bool:
    return any(name in report.info for report in reports)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else round(value, 4)


def _report(client: httpx.Client, service: str, url: str) -> Report:
    try:
        ready = client.get(f"{url}/readyz")
        checks = msgspec.json.decode(ready.content, type=_Readiness).checks
    except (httpx.HTTPError, httpx.InvalidURL):
        return Report(service, url, "unreachable", [], {}, {})
    except msgspec.DecodeError:
        return Report(service, url, "does not answer like Tailrace", [], {}, {})
    failed = [name for name, holds in checks.items() if not holds]
    info, figures = _metrics(client, service, url)
    if info.get("service", service) != service:
        return Report(service, url, f"this is {info['service']}", [], {}, {})
    return Report(service, url, "ok" if ready.is_success else "not ready", failed, info, figures)


class _Readiness(msgspec.Struct):
    checks: dict[str, bool]


def _metrics(client: httpx.Client, service: str, url: str) -> tuple[dict[str, str], dict[str, float]]:
    """Return the labels of ``tailrace_service_info`` and the sums of the metrics in `_FIGURES`."""
    try:
        answer = client.get(f"{url}/metrics")
    except httpx.HTTPError:
        return {}, {}
    if not answer.is_success:
        return {}, {}
    wanted = _FIGURES[service]
    info: dict[str, str] = {}
    figures: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == "tailrace_service_info":
                info = dict(sample.labels)
            elif sample.name in wanted:
                name = wanted[sample.name]
                figures[name] = figures.get(name, 0.0) + sample.value
    return info, figures
