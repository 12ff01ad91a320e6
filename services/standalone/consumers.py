"""Commands of ``tailrace consumers``. Each returns the exit code."""

import random
import time
from typing import Any, Final

import click
import httpx
import msgspec

from schemas.names import InvalidName, check_name
from services.standalone.api import Api, refusal
from services.standalone.backoff import reconnect_delay
from services.standalone.errors import EXIT_OK, Refused, Unreachable
from services.standalone.tables import moment, print_table
from services.standalone.terminal import Terminal, pretty

__all__ = ["ConsumersApi", "consumers"]

_PATH: Final = "/v1/consumers"
WAIT_SECONDS: Final = 20
BATCH: Final = 100
MAX_FAILURES: Final = 8
"""Failed requests in a row after which `events` gives up (about 25 s)."""


class ConsumersApi(Api):
    """Client of delivery's durable consumers."""

    def put(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Create or change a consumer; return it."""
        return self._object("PUT", f"{_PATH}/{name}", json=spec)

    def all(self) -> list[dict[str, Any]]:
        """Return all consumers, ordered by name."""
        return list(self._object("GET", _PATH).get("consumers", []))

    def get(self, name: str) -> dict[str, Any]:
        """Return one consumer."""
        return self._object("GET", f"{_PATH}/{name}")

    def call(self, name: str, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Pause or resume a consumer; return it."""
        return self._object("POST", f"{_PATH}/{name}/{verb}", json=body)

    def drop(self, name: str) -> None:
        """Remove a consumer permanently."""
        self._send_checked("DELETE", f"{_PATH}/{name}")

    def batch(self, name: str, wait: int) -> list[dict[str, Any]]:
        """Return at most `BATCH` pending events; wait up to ``wait`` seconds for the first."""
        query = {"batch": BATCH, "wait": wait}
        timeout = httpx.Timeout(wait + 15.0, connect=5.0)
        return list(self._object("GET", f"{_PATH}/{name}/events", params=query, timeout=timeout).get("events", []))

    def acknowledge(self, name: str, events: list[dict[str, Any]]) -> None:
        """Acknowledge handled events."""
        self._object("POST", f"{_PATH}/{name}/acks", json={"acks": [event["token"] for event in events]})

    def dead_events(self, name: str) -> list[dict[str, Any]]:
        """Return the oldest dead events (200 at most)."""
        return list(self._object("GET", f"{_PATH}/{name}/dead", params={"limit": 200}).get("events", []))

    def redeliver(self, name: str, event: str) -> None:
        """Deliver a dead event to the consumer again."""
        self._send_checked("POST", f"{_PATH}/{name}/dead/{event}/resend")

    def _send_checked(self, method: str, path: str) -> None:
        answer = self._send(method, path)
        if answer.is_error:
            raise refusal(answer)


def _checked(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    try:
        return value if value is None else check_name(str(param.name), value)
    except InvalidName as error:
        raise click.BadParameter(str(error)) from error


_name = click.argument("consumer", callback=_checked)
_url = click.option(
    "--url", envvar="TAILRACE_URL", default="http://127.0.0.1:8080", show_default=True, help="Address of delivery."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group()
def consumers() -> None:
    """Durable consumers: named readers whose position the broker stores."""


@consumers.command()
@_name
@click.option("--session", callback=_checked, help="Read only this session [all].")
@click.option("--type", "types", multiple=True, help="Deliver only events of this type; may be repeated [all].")
@click.option("--new", is_flag=True, help="Start with new events [the oldest event in the log].")
@click.option("--after", metavar="CURSOR", help="Start after this cursor of the session.")
@click.option("--since", type=float, metavar="SECONDS", help="Start at this time, in seconds since 1970.")
@click.option(
    "--ack-wait", type=float, metavar="SECONDS", help="Time until an unacknowledged event is redelivered [30]."
)
@click.option("--max-in-flight", type=int, help="Largest number of unacknowledged events [1000].")
@click.option("--max-deliver", type=int, help="Deliveries of an event before it is dead [5].")
@_json
@_url
def create(*, consumer: str, new: bool, types: tuple[str, ...], as_json: bool, url: str, **others: Any) -> int:
    """Create or change CONSUMER."""
    spec = {name: value for name, value in others.items() if value is not None}
    spec |= ({"types": list(types)} if types else {}) | ({"start": "new"} if new else {})
    with ConsumersApi(url) as api:
        return _show(Terminal(), api.put(consumer, spec), as_json=as_json)


@consumers.command("list")
@_json
@_url
def list_(*, as_json: bool, url: str) -> int:
    """List durable consumers by name."""
    terminal = Terminal()
    with ConsumersApi(url) as api:
        rows = api.all()
    if as_json:
        terminal.show(pretty({"consumers": rows}))
    elif not rows:
        terminal.remark("no consumers")
    else:
        columns = ["name", "session", "types", "pending", "in_flight", "dead", "paused"]
        print_table(terminal, columns, [[_cell(row.get(column)) for column in columns] for row in rows])
    return EXIT_OK


@consumers.command()
@_name
@_json
@_url
def show(*, consumer: str, as_json: bool, url: str) -> int:
    """Show the state and position of CONSUMER."""
    with ConsumersApi(url) as api:
        return _show(Terminal(), api.get(consumer), as_json=as_json)


@consumers.command()
@_name
@_url
def delete(*, consumer: str, url: str) -> int:
    """Remove CONSUMER, its position and its dead events."""
    with ConsumersApi(url) as api:
        api.drop(consumer)
    Terminal().remark(f"{consumer} is removed")
    return EXIT_OK


@consumers.command()
@_name
@click.option("--seconds", type=float, help="Duration [until it is resumed].")
@_json
@_url
def pause(*, consumer: str, seconds: float | None, as_json: bool, url: str) -> int:
    """Stop delivering events to CONSUMER for a time."""
    with ConsumersApi(url) as api:
        return _show(Terminal(), api.call(consumer, "pause", {"seconds": seconds}), as_json=as_json)


@consumers.command()
@_name
@_json
@_url
def resume(*, consumer: str, as_json: bool, url: str) -> int:
    """Deliver events to CONSUMER again."""
    with ConsumersApi(url) as api:
        return _show(Terminal(), api.call(consumer, "resume"), as_json=as_json)


@consumers.command()
@_name
@click.option("--drain", is_flag=True, help="Exit when no event is pending, instead of waiting for more.")
@_url
def events(*, consumer: str, drain: bool, url: str) -> int:
    """Print the events of CONSUMER as lines of JSON, and acknowledge each batch when it has been printed.

    Events that were printed but could not be acknowledged are printed again.
    """
    terminal, failures = Terminal(), 0
    with ConsumersApi(url) as api:
        while True:
            try:
                batch = api.batch(consumer, 0 if drain else WAIT_SECONDS)
                for event in batch:
                    terminal.write(msgspec.json.encode(event).decode() + "\n")
                if batch:
                    api.acknowledge(consumer, batch)
            except (Unreachable, Refused) as error:
                failures += 1
                if failures > MAX_FAILURES or (isinstance(error, Refused) and error.status < 500):
                    raise
                time.sleep(reconnect_delay(failures, random.random()))
                continue
            failures = 0
            if drain and not batch:
                return EXIT_OK


@consumers.command()
@_name
@_json
@_url
def dead(*, consumer: str, as_json: bool, url: str) -> int:
    """List the dead events of CONSUMER, oldest first."""
    terminal = Terminal()
    with ConsumersApi(url) as api:
        rows = api.dead_events(consumer)
    if as_json:
        terminal.show(pretty({"events": rows}))
    elif not rows:
        terminal.remark("no dead events")
    else:
        columns = ["id", "session", "generation", "seq", "type", "deliveries"]
        cells = [[*(row.get(column) for column in columns), moment(row.get("died_at"))] for row in rows]
        print_table(terminal, [*columns, "died"], cells)
    return EXIT_OK


@consumers.command()
@_name
@click.argument("event", callback=_checked)
@_url
def resend(*, consumer: str, event: str, url: str) -> int:
    """Deliver the dead EVENT (its id) to CONSUMER again."""
    with ConsumersApi(url) as api:
        api.redeliver(consumer, event)
    Terminal().remark(f"{event} will be delivered to {consumer} again")
    return EXIT_OK


def _show(terminal: Terminal, view: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        terminal.show(pretty(view))
        return EXIT_OK
    rows = [(name, _cell(value)) for name, value in view.items() if name != "position"]
    print_table(terminal, ["", ""], rows)
    positions = view.get("position", [])
    if positions:
        print_table(terminal, list(positions[0]), [list(position.values()) for position in positions])
    return EXIT_OK


def _cell(value: object) -> object:
    match value:
        case None:
            return ""
        case list():
            return ", ".join(map(str, value))
        case bool():
            return "yes" if value else "no"
        case _:
            return value
