"""Test the decisions of `tailrace up` before it starts a service."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.processes import restart_delay
from services.standalone.backoff import reconnect_delay
from services.standalone.embedded import find_nats_server, parse_version, payload_for, render_config
from services.standalone.errors import CannotStart, FolderInUse, PortsTaken
from services.standalone.folder import locked
from services.standalone.output import MAX_LINE, LineSplitter, OutputFile, brief
from services.standalone.plan import Options, console_models, plan_services, summary
from services.standalone.ports import WantedPort, settle_ports
from services.standalone.up import wanted_body


def options(tmp_path: Path, **changes: object) -> Options:
    values: dict[str, object] = {
        "data": tmp_path, "delivery_port": 8080, "grpc_port": 50051, "billing_port": 8081,
        "producer_ports": (8082,), "nats_port": 4222,
    }  # fmt: skip
    return Options(**(values | changes))  # type: ignore[arg-type]


def planned(tmp_path: Path, env: dict[str, str], config: dict[str, object] | None = None) -> dict[str, dict[str, str]]:
    specs = plan_services(options(tmp_path, producer_ports=(8082, 8083)), env, config or {}, "/nats-server")
    return {spec.name: dict(spec.env) for spec in specs}


def test_every_producer_gets_its_own_port_and_all_share_the_wiring(tmp_path: Path) -> None:
    env = planned(tmp_path, {"PATH": "/bin"})
    assert env["producer"]["TAILRACE_PRODUCER_PORT"] == "8082"
    assert env["producer-2"]["TAILRACE_PRODUCER_PORT"] == "8083"
    assert {e["TAILRACE_NATS_URL"] for e in env.values()} == {"nats://127.0.0.1:4222"}
    assert env["delivery"]["TAILRACE_DELIVERY_BILLING_URL"] == "http://127.0.0.1:8081"
    assert env["billing"]["TAILRACE_BILLING_CORS_ORIGINS"] == "http://127.0.0.1:8080,http://localhost:8080"
    assert env["delivery"]["PATH"] == "/bin"


def test_variables_of_the_command_line_do_not_reach_the_services_and_unknown_ones_do(tmp_path: Path) -> None:
    env = planned(tmp_path, {"TAILRACE_URL": "x", "TAILRACE_BILLING_URL": "x", "TAILRACE_TYPO": "1"})
    assert "TAILRACE_URL" not in env["billing"]
    assert "TAILRACE_BILLING_URL" not in env["billing"]
    assert env["billing"]["TAILRACE_TYPO"] == "1"


def test_a_setting_made_by_hand_wins_over_the_wiring(tmp_path: Path) -> None:
    by_variable = planned(tmp_path, {"TAILRACE_DELIVERY_BILLING_URL": "https://b"})
    assert by_variable["delivery"]["TAILRACE_DELIVERY_BILLING_URL"] == "https://b"
    by_file = planned(tmp_path, {}, {"delivery": {"billing_url": "https://b"}})
    assert "TAILRACE_DELIVERY_BILLING_URL" not in by_file["delivery"]


def test_the_broker_starts_first_and_stops_last(tmp_path: Path) -> None:
    specs = {s.name: s for s in plan_services(options(tmp_path), {}, {}, "/nats-server")}
    broker = specs.pop("nats-server")
    assert all(broker.start_phase < s.start_phase and broker.stop_phase > s.stop_phase for s in specs.values())
    assert specs["billing"].stop_phase > max(specs["delivery"].stop_phase, specs["producer"].stop_phase)


def test_offered_models_follow_the_keys_and_the_configuration() -> None:
    assert console_models({}, {}) == ["scripted/story", "scripted/reasoning", "scripted/tools"]
    assert "openai/gpt-4o-mini" in console_models({"OPENAI_API_KEY": "k"}, {})
    assert console_models({}, {"models": {"fast": {}}})[0] == "fast"


@pytest.mark.parametrize(
    ("env", "config", "asked"),
    [
        ({}, {}, False),
        ({"TAILRACE_ADMIN_KEY_HASH": "a.b"}, {}, True),
        ({}, {"shared": {"jwt_jwks_url": "https://issuer.test/keys"}}, True),
        ({"TAILRACE_AUTH": "required"}, {}, True),
        ({"TAILRACE_AUTH": "insecure"}, {"shared": {"admin_key_hash": "a.b"}}, False),
    ],
)
def test_summary_has_a_hint_when_no_key_is_required(
    tmp_path: Path, env: dict[str, str], config: dict[str, Any], asked: bool
) -> None:
    hint = ("", "reachable only from this machine; no credentials required")
    assert (hint in summary(options(tmp_path), "2.15.1", env, config)) is not asked


def test_summary_has_a_hint_when_only_the_scripted_provider_is_available(tmp_path: Path) -> None:
    hint = ("", "no API key set: the scripted provider answers")
    assert hint in summary(options(tmp_path), "2.15.1", {})
    assert hint not in summary(options(tmp_path), "2.15.1", {"OPENAI_API_KEY": "k"})


def test_every_port_that_is_not_free_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        with pytest.raises(PortsTaken) as raised:
            settle_ports([WantedPort("delivery", ports[0], "--port"), WantedPort("NATS", ports[1], "--nats-port")])
    assert len(raised.value.problems) == 2
    assert f"{ports[0]} for delivery: address already in use (--port)" in str(raised.value)
    assert "--nats-port" in str(raised.value)


def test_one_port_wanted_twice_is_reported_with_both_names() -> None:
    (port,) = settle_ports([WantedPort("delivery", 0, "")])
    with pytest.raises(PortsTaken, match="billing is also the port of delivery"):
        settle_ports([WantedPort("delivery", port, "--port"), WantedPort("billing", port, "--billing-port")])


def test_port_zero_takes_different_free_ports() -> None:
    ports = settle_ports([WantedPort(str(n), 0, "") for n in range(8)])
    assert len(set(ports)) == 8
    assert 0 not in ports


def test_locked_folder_refuses_a_second_holder_and_names_the_first(tmp_path: Path) -> None:
    with locked(tmp_path, print) as describe:
        describe("process 1234, http://127.0.0.1:8080")
        with pytest.raises(FolderInUse, match=r"process 1234, http://127\.0\.0\.1:8080"), locked(tmp_path, print):
            pass
    with locked(tmp_path, print):
        pass


def test_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match="cannot write to the data folder"), locked(tmp_path / "file", print):
        pass


def fake_nats_server(folder: Path, version: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "nats-server"
    path.write_text(f"#!{sys.executable}\nprint('nats-server: v{version}')\n")
    path.chmod(0o755)
    return path


def test_new_enough_server_on_the_path_wins(tmp_path: Path) -> None:
    path = fake_nats_server(tmp_path, "2.12.0")
    assert find_nats_server(str(tmp_path)) == (path, (2, 12, 0))


def test_server_on_the_path_that_is_too_old_is_skipped(tmp_path: Path) -> None:
    fake_nats_server(tmp_path, "2.9.10")
    found = find_nats_server(str(tmp_path))
    assert found.path.parent != tmp_path
    assert found.version >= (2, 12)


@pytest.mark.parametrize(
    ("text", "version"), [("nats-server: v2.15.1", (2, 15, 1)), ("2.12.0-RC.1", (2, 12, 0)), ("", None), ("v2", None)]
)
def test_version_is_parsed_from_the_output_of_the_server(text: str, version: object) -> None:
    assert parse_version(text) == version


def test_configuration_quotes_the_folder() -> None:
    assert 'store_dir: "/a \\"b\\"/nats"' in render_config(4222, Path('/a "b"/nats'))
    assert 'listen: "127.0.0.1:4222"' in render_config(4222, Path("/x"))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"event": "broker reconnected", "level": "info"}', None),
        (
            '{"event": "broker disconnected", "level": "warning", "service": "billing", "session": "s"}',
            "broker disconnected  session=s",
        ),
        ('{"event": "failed", "level": "error", "exception": "Traceback\\nValueError: no"}', "failed  ValueError: no"),
        ("[12] 2026/01/01 10:00:00.000000 [INF] Server is ready", None),
        ("[12] 2026/01/01 10:00:00.000000 [ERR] disk full", "disk full"),
        ("tailrace: settings are not usable", "tailrace: settings are not usable"),
        ("INFO - 2026-01-01 10:00:00,259 - alembic - migrated", None),
        ("", None),
        ("[1, 2]", "[1, 2]"),
    ],
)  # fmt: skip
def test_terminal_shows_warnings_and_plain_text_alone(line: str, shown: str | None) -> None:
    assert brief(line) == shown


@given(st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b and not b.endswith(b"\r"))), st.data())
def test_lines_are_the_same_under_every_chunking_of_the_output(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    splitter, got, rest = LineSplitter(), list[str](), stream
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        got += splitter.feed(rest[:cut])
        rest = rest[cut:]
    assert got + splitter.finish() == [line.decode(errors="replace") for line in lines]


def test_endless_line_is_cut() -> None:
    splitter = LineSplitter()
    lines = [line for _ in range(10) for line in splitter.feed(b"x" * MAX_LINE)]
    assert lines
    assert all(len(line) <= MAX_LINE for line in lines)


def test_log_files_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.standalone.output.FILE_BYTES", 10_000)
    output = OutputFile(tmp_path / "x.log", lambda _line: None)
    for _ in range(1_000):
        output.feed(json.dumps({"event": "x" * 100}).encode() + b"\n")
    output.close()
    assert sum(os.path.getsize(path) for path in tmp_path.iterdir()) <= 30_000


@given(st.integers(1, 100), st.floats(0, 1))
def test_restart_and_reconnect_delays_are_positive_and_bounded(times: int, chance: float) -> None:
    assert 0 < restart_delay(times) <= 8
    assert 0 < reconnect_delay(times, chance) <= 8


@pytest.mark.parametrize(
    ("env", "config", "size"),
    [
        ({}, {}, 0),
        ({"TAILRACE_DELIVERY_MAX_BODY": "33554432"}, {"delivery": {"max_body": 1}}, 33_554_432),
        ({}, {"delivery": {"max_body": 20_000_000}}, 20_000_000),
        ({"TAILRACE_DELIVERY_MAX_BODY": "many"}, {}, 0),
    ],
)
def test_max_payload_of_the_broker_fits_the_body_limit_of_delivery(
    env: dict[str, str], config: dict[str, Any], size: int
) -> None:
    assert wanted_body(env, config) == size
    assert f"max_payload: {payload_for(size)}\n" in render_config(4222, Path("/x"), payload_for(size))
