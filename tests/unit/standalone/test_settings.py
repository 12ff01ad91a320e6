"""Test the checks of settings in `tailrace up` before it starts a service."""

from pathlib import Path

import pytest

from services.kit.settings import read_config
from services.standalone.errors import CannotStart
from services.standalone.plan import without_own_variables
from services.standalone.ports import read_ports
from services.standalone.settings_check import overruled, wrong_settings
from services.standalone.terminal import Terminal
from services.standalone.up import UpOptions, up
from tests.unit.standalone.test_plan import options

WRONG = {
    "TAILRACE_PRODUCER_SLOTS": "x",
    "TAILRACE_DELIVERY_DRAIN": "-1",
    "TAILRACE_BILLING_PARTIAL": "guess",
    "TAILRACE_LEASE": "0",
    "TAILRACE_DELIVRY_PORT": "1",
}


def test_problems_of_all_services_are_reported_together_and_once() -> None:
    problems = wrong_settings(WRONG)
    assert {problem.split(":")[0] for problem in problems} == set(WRONG)
    assert len(problems) == len(WRONG)


def test_a_file_is_checked_whole(tmp_path: Path) -> None:
    path = tmp_path / "tailrace.toml"
    path.write_text(
        'billing = 3\n[delivry]\nport = 1\n[shared]\npartitons = 2\n[delivery]\nfeeds = "x"\n[models.m]\nnothing = 1\n'
    )
    problems = wrong_settings({"TAILRACE_CONFIG": str(path)})
    places = ["[billing]", "[delivry]", "[shared] partitons", "[delivery] feeds", "[models.m] nothing"]
    assert [place for place in places if not any(problem.startswith(f"{place}:") for problem in problems)] == []


def test_variables_of_the_command_line_are_no_unknown_settings() -> None:
    assert wrong_settings({"TAILRACE_URL": "http://127.0.0.1:1", "TAILRACE_KEY": "k", "TAILRACE_PRODUCERS": "2"}) == []


def test_invalid_settings_create_no_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WRONG, "TAILRACE_BILLING_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    options = UpOptions(data=tmp_path / "data", config=None, producers=1, ports={})
    with pytest.raises(CannotStart) as refused:
        up(options, "1", Terminal())
    assert all(name in str(refused.value) for name in (*WRONG, "TAILRACE_BILLING_PORT"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("flags", "env", "config", "port"),
    [
        ({"billing": 0}, {"TAILRACE_BILLING_PORT": "9"}, {"billing": {"port": 8}}, 0),
        ({}, {"TAILRACE_BILLING_PORT": "9"}, {"billing": {"port": 8}}, 9),
        ({}, {"TAILRACE_BILLING_PORT": "0"}, {"billing": {"port": 8}}, 0),
        ({}, {}, {"billing": {"port": 8}}, 8),
        ({"billing": None}, {"TAILRACE_BILLING_PORT": ""}, {}, 8081),
    ],
)
def test_a_port_is_read_from_the_flag_the_variable_or_the_file(
    flags: dict[str, int | None], env: dict[str, str], config: dict[str, object], port: int
) -> None:
    problems: list[str] = []
    assert read_ports(flags, env, config, problems)["billing"] == port
    assert problems == []


def test_settings_that_up_does_not_use_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "tailrace.toml"
    path.write_text('[shared]\nlog_format = "json"\n[delivery]\nhost = "0.0.0.0"\n')
    env = {"TAILRACE_NATS_URL": "nats://elsewhere:4222", "TAILRACE_BILLING_TLS_CERT": "c", "TAILRACE_CONFIG": str(path)}
    lines = overruled(env, read_config(env))
    assert [line.split(" is not used by `tailrace up`: ")[0] for line in lines] == [
        "TAILRACE_NATS_URL",
        "TAILRACE_BILLING_TLS_CERT",
        "[shared] log_format",
        "[delivery] host",
    ]


def test_every_setting_that_up_overrides_is_reported(tmp_path: Path) -> None:
    """No variable that reaches the services is changed in silence."""
    from services.standalone.plan import plan_services

    own = {"TAILRACE_DATA", "TAILRACE_CONFIG"}  # options of the command, as the ports are
    specs = plan_services(options(tmp_path), {}, {}, "/nats-server")
    decided = {name for spec in specs for name in spec.env if name.startswith("TAILRACE_")}
    ports = {name for name in decided if name.endswith("_PORT")}
    for name in sorted(decided - own - ports):
        given = without_own_variables({name: "by hand"})
        planned = plan_services(options(tmp_path), given, {}, "/nats-server")
        followed = all(spec.env.get(name) == "by hand" for spec in planned)
        assert followed or overruled(given, {}), name
