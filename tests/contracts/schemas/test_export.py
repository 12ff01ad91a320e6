"""Test that the exported schemas equal those of the code and validate the same messages as the codec."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import export, subjects
from schemas.codec import encode_event
from schemas.delivered import delivered_subject
from schemas.events import AnyEvent, Event
from schemas.requests import GenerationRecord, Request
from tests.support.struct_strategies import any_event, struct

FOLDER = Path(export.__file__).parent
DOCUMENTS = {path: json.loads(text) for path, text in export.documents().items()}
ASYNCAPI = DOCUMENTS["asyncapi.json"]
TAGS = sorted(t.__struct_config__.tag for t in get_args(AnyEvent))


def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(DOCUMENTS[f"json/{name}.json"])


VALIDATORS = {name: validator(name) for name in [*TAGS, "event", "request", "generation_record"]}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "schemas.export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_committed_files_are_up_to_date() -> None:
    result = run("--check")
    assert (result.returncode, result.stderr) == (0, "")


def test_changed_missing_and_obsolete_files_are_each_reported(tmp_path: Path) -> None:
    assert export.main(["--folder", str(tmp_path)]) == 0
    assert run("--check", "--folder", str(tmp_path)).returncode == 0
    (tmp_path / "json" / "delta.json").write_text("{}")
    (tmp_path / "json" / "started.json").unlink()
    (tmp_path / "json" / "forgotten.json").write_text("{}")
    result = run("--check", "--folder", str(tmp_path))
    assert result.returncode == 1
    assert [line.split()[0] for line in result.stderr.splitlines()] == [
        "json/delta.json",
        "json/forgotten.json",
        "json/started.json",
    ]
    assert export.main(["--folder", str(tmp_path)]) == 0
    assert export.main(["--check", "--folder", str(tmp_path)]) == 0


@pytest.mark.parametrize("path", sorted(p for p in DOCUMENTS if p.startswith("json/")))
def test_every_exported_schema_is_a_valid_schema(path: str) -> None:
    jsonschema_rs.meta.validate(DOCUMENTS[path])


@settings(deadline=None)
@given(any_event())
def test_every_encoded_event_satisfies_its_schema_and_no_other(event: Event) -> None:
    data = json.loads(encode_event(event))
    VALIDATORS["event"].validate(data)
    assert [name for name in TAGS if VALIDATORS[name].is_valid(data)] == [data["type"]]


@settings(deadline=None)
@given(struct(Request) | struct(GenerationRecord))
def test_every_request_and_record_satisfies_its_schema(record: Any) -> None:
    name = "request" if isinstance(record, Request) else "generation_record"
    VALIDATORS[name].validate(json.loads(msgspec.json.encode(record)))
    assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record


@settings(deadline=None)
@given(any_event(), st.data())
def test_schema_and_codec_refuse_the_same_wrong_types(event: Event, data: st.DataObject) -> None:
    fields = json.loads(encode_event(event))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(st.sampled_from([None, -1, 1.5, "x", [], {}, True, [7], {"a": 1}, 10**20]))
    try:
        msgspec.json.decode(json.dumps(fields), type=AnyEvent)
    except msgspec.ValidationError:
        assert not VALIDATORS["event"].is_valid(fields)
    else:
        VALIDATORS["event"].validate(fields)


def refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in refs(item)]
    return [ref for item in value for ref in refs(item)] if isinstance(value, list) else []


def test_every_reference_of_the_asyncapi_document_resolves() -> None:
    for ref in refs(ASYNCAPI):
        if ref.startswith("./"):
            assert ref.removeprefix("./") in DOCUMENTS
            continue
        node: Any = ASYNCAPI
        for step in ref.removeprefix("#/").split("/"):
            node = node[step]


def test_the_asyncapi_addresses_equal_the_subjects_of_the_code() -> None:
    names = {"partition": "0", "tenant": "acme", "session": "chat", "generation": "gen_1", "pool": "default"}
    addresses = {name: channel["address"].format(**names) for name, channel in ASYNCAPI["channels"].items()}
    assert addresses == {
        "tokens": subjects.token_subject(subjects.Address.of("acme", "chat", "gen_1", 1)),
        "live": subjects.live_filter(0, "acme", "chat", "gen_1"),
        "requests": subjects.request_subject("default", "gen_1"),
        "dead": subjects.dead_subject("default", "gen_1"),
        "delivered": delivered_subject("acme", "chat", "gen_1"),
        "control": subjects.control_subject("acme", "chat", "gen_1"),
        "presence": subjects.presence_subject("acme", "chat", "gen_1"),
        "deleted": subjects.deleted_subject("acme", "chat"),
    }


def test_every_parameter_of_an_address_is_described_and_no_other() -> None:
    for channel in ASYNCAPI["channels"].values():
        assert set(channel["parameters"]) == {
            p for p in ASYNCAPI["components"]["parameters"] if f"{{{p}}}" in channel["address"]
        }


@pytest.mark.parametrize("channel", ["tokens", "live"])
def test_every_event_type_is_a_message_of_the_log(channel: str) -> None:
    assert sorted(ASYNCAPI["channels"][channel]["messages"]) == TAGS
