"""Export the schemas for clients in other languages: ``python -m schemas.export [--check]``.

JSON Schemas (draft 2020-12) of events and records go into ``schemas/json``, the AsyncAPI document of the subjects into
``schemas/asyncapi.json``. ``--check`` writes nothing and exits with 1 when a file is out of date.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from schemas.asyncapi import asyncapi
from schemas.delivered import DeliveredReport
from schemas.events import AnyEvent
from schemas.requests import Announcement, DeletedSession, GenerationRecord, Request
from schemas.usage import Counted, Usage

__all__ = ["documents", "main"]

_HERE: Final = Path(__file__).parent
_TYPES: Final[dict[str, Any]] = {
    **{t.__struct_config__.tag: t for t in get_args(AnyEvent)},
    "event": AnyEvent,
    "request": Request,
    "generation_record": GenerationRecord,
    "deleted_session": DeletedSession,
    "announcement": Announcement,
    "delivered_report": DeliveredReport,
    "usage_counts": Usage,
    "counted": Counted,
}


def documents() -> dict[str, str]:
    """Return the text of each exported file by its path in this folder; deterministic."""
    files = {f"json/{name}.json": _text(_schema(name, type_)) for name, type_ in sorted(_TYPES.items())}
    return {**files, "asyncapi.json": _text(asyncapi())}


def _schema(name: str, type_: Any) -> dict[str, Any]:
    schema = msgspec.json.schema(type_)
    definitions = schema.pop("$defs", {})
    if "$ref" in schema:
        schema = definitions.pop(schema["$ref"].rsplit("/", 1)[-1])
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:tailrace:schema:{name}"}
    rest = {"$defs": dict(sorted(definitions.items()))} if definitions else {}
    tidied: dict[str, Any] = _tidy({**head, **schema, **rest})
    return tidied


def _tidy(value: Any) -> Any:
    """Return a part of a schema with the indentation of its descriptions removed."""
    if isinstance(value, dict):
        return {
            k: inspect.cleandoc(v) if k == "description" and isinstance(v, str) else _tidy(v) for k, v in value.items()
        }
    return [_tidy(item) for item in value] if isinstance(value, list) else value


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def stale(folder: Path) -> list[str]:
    """Return the paths in ``folder`` that are out of date, missing, or no longer exported."""
    wanted = documents()
    kept = {f"json/{path.name}" for path in (folder / "json").glob("*.json")}
    wrong = {path for path, text in wanted.items() if _read(folder / path) != text}
    return sorted(wrong | (kept - set(wanted)))


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def write(folder: Path) -> None:
    """Write every document, and remove schemas that are no longer exported."""
    wanted = documents()
    (folder / "json").mkdir(parents=True, exist_ok=True)
    for path in stale(folder):
        if path in wanted:
            (folder / path).write_text(wanted[path], encoding="utf-8")
        else:
            (folder / path).unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the exported files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m schemas.export", description="export JSON Schemas and AsyncAPI")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is out of date")
    parser.add_argument("--folder", type=Path, default=_HERE, help="where to write (default: beside this module)")
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.folder)
        return 0
    wrong = stale(options.folder)
    for path in wrong:
        sys.stderr.write(f"{path} is out of date: run python -m schemas.export\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
