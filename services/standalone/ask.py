"""Arguments of ``tailrace ask``."""

import sys
from typing import Any

import click
import msgspec

from services.standalone import commands
from services.standalone.api import Api
from services.standalone.options import complete_session, json_option, named, pairs_of, url_option
from services.standalone.terminal import Terminal

__all__ = ["ask"]


@click.command()
@click.argument("question", required=False)
@click.option("--model", "-m", default="scripted/story", show_default=True, help="Model to ask, as provider/model.")
@click.option(
    "--session",
    "-s",
    callback=named("session"),
    shell_complete=complete_session,
    help="Session to write to [a new one]. Its earlier questions and answers are not sent to the model.",
)
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=click.IntRange(1), help="Limit of output tokens.")
@click.option(
    "--param",
    "params",
    metavar="NAME=VALUE",
    multiple=True,
    callback=pairs_of,
    help="Parameter for the provider, its value as JSON or text; may be repeated.",
)
@click.option(
    "--label",
    "labels",
    metavar="NAME=VALUE",
    multiple=True,
    callback=pairs_of,
    help="Label of the generation; may be repeated.",
)
@click.option(
    "--idempotency-key", metavar="KEY", help="Repeating the command with the same key asks only once; needs --session."
)
@json_option
@url_option
def ask(
    *,
    question: str | None,
    model: str,
    session: str | None,
    system: str | None,
    max_tokens: int | None,
    params: dict[str, str],
    labels: dict[str, str],
    idempotency_key: str | None,
    as_json: bool,
    url: str,
) -> int:
    """Ask QUESTION and print the answer as it arrives.

    Without QUESTION, or with "-", it is read from standard input. The model receives only this question, not the rest
    of the session. Ctrl-C cancels the generation; a second Ctrl-C exits.
    """
    if idempotency_key is not None and session is None:
        raise click.UsageError("--idempotency-key needs --session: keys are scoped to a session")
    text = _question(question)
    messages = [{"role": "system", "content": system}] if system else []
    body: dict[str, Any] = {"model": model, "messages": [*messages, {"role": "user", "content": text}]}
    parameters = {name: _json_or_text(value) for name, value in params.items()}
    if max_tokens is not None:
        parameters["max_tokens"] = max_tokens
    body |= {name: value for name, value in (("params", parameters), ("metadata", labels)) if value}
    with Api(url) as api:
        return commands.ask(api, Terminal(), session, body, idempotency_key, as_json=as_json)


def _json_or_text(value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value


def _question(argument: str | None) -> str:
    if argument is None and sys.stdin.isatty():
        raise click.UsageError('no question: use tailrace ask "…", or pipe it into standard input')
    from_input = argument in {None, "-"}
    text = sys.stdin.read() if from_input else str(argument)
    if not text.strip():
        raise click.UsageError(f"{'standard input' if from_input else 'QUESTION'} is empty")
    return text.strip() if from_input else text
