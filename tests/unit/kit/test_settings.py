"""Settings from the environment and the file."""

from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from services.kit.settings import SERVICES, SettingsError, Shared, load_settings, read_config


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 8080
    drain: float = 5.0
    open: bool = False
    url: str | None = None
    origins: list[str] = []
    ports: tuple[int, ...] = ()
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if self.port == 13:
            raise ValueError("port 13 is not for us")


class Billing(msgspec.Struct, frozen=True, kw_only=True):
    database_url: str


def load(**env: str) -> Delivery:
    return load_settings(Delivery, "delivery", env)[1]


def problems(**env: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(Delivery, "delivery", env)
    return caught.value.problems


def config(folder: Path, text: str) -> str:
    path = folder / "tailrace.toml"
    path.write_text(text)
    return str(path)


def test_an_empty_environment_gives_the_defaults() -> None:
    assert load_settings(Delivery, "delivery", {}) == (Shared(), Delivery())


def test_each_field_is_read_from_its_variable_in_its_type() -> None:
    settings = load(
        TAILRACE_DELIVERY_PORT="9",
        TAILRACE_DELIVERY_DRAIN="0.5",
        TAILRACE_DELIVERY_OPEN="true",
        TAILRACE_DELIVERY_URL="http://x",
        TAILRACE_DELIVERY_ORIGINS="http://a, http://b ,",
        TAILRACE_DELIVERY_PORTS="1,2",
    )
    assert settings == Delivery(
        port=9, drain=0.5, open=True, url="http://x", origins=["http://a", "http://b"], ports=(1, 2)
    )


def test_an_empty_variable_is_nothing_where_nothing_is_possible_and_an_empty_list_otherwise() -> None:
    settings = load(TAILRACE_DELIVERY_URL="", TAILRACE_DELIVERY_ORIGINS="")
    assert (settings.url, settings.origins) == (None, [])


def test_shared_settings_have_no_service_in_their_names() -> None:
    shared, _ = load_settings(Delivery, "delivery", {"TAILRACE_NATS_URL": "nats://elsewhere:4222"})
    assert shared.nats_url == "nats://elsewhere:4222"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TAILRACE_DELIVERY_PORT", "http"),
        ("TAILRACE_DELIVERY_PORT", ""),
        ("TAILRACE_DELIVERY_DRAIN", "soon"),
        ("TAILRACE_DELIVERY_OPEN", "perhaps"),
        ("TAILRACE_DELIVERY_PORTS", "1,two"),
        ("TAILRACE_DELIVERY_SHARE", "1.5"),
        ("TAILRACE_LOG_LEVEL", "loud"),
        ("TAILRACE_DELIVERY_PROT", "1"),
        ("TAILRACE_NATSURL", "x"),
    ],
)
def test_a_wrong_or_unknown_variable_is_named(variable: str, value: str) -> None:
    (problem,) = problems(**{variable: value})
    assert problem.startswith(f"{variable}: ")


def test_all_problems_are_reported_together() -> None:
    found = problems(TAILRACE_DELIVERY_PORT="http", TAILRACE_REPLICAS="few", TAILRACE_NONSENSE="1")
    assert sorted(p.split(":")[0] for p in found) == [
        "TAILRACE_DELIVERY_PORT",
        "TAILRACE_NONSENSE",
        "TAILRACE_REPLICAS",
    ]


def test_the_message_lists_every_problem() -> None:
    with pytest.raises(SettingsError, match=r"(?s)settings are not usable:.*  - TAILRACE_X.*  - TAILRACE_Y"):
        load(TAILRACE_X="1", TAILRACE_Y="2")


def test_a_required_setting_that_is_missing_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(Billing, "billing", {})
    assert caught.value.problems == ["TAILRACE_BILLING_DATABASE_URL: must be set"]


def test_a_rule_over_several_fields_is_reported_like_any_other() -> None:
    assert problems(TAILRACE_DELIVERY_PORT="13") == ["port 13 is not for us"]


@pytest.mark.parametrize("other", [s for s in SERVICES if s != "delivery"])
def test_variables_of_other_services_are_theirs(other: str) -> None:
    assert load(**{f"TAILRACE_{other.upper()}_PORT": "x"}) == Delivery()


def test_variables_of_other_programs_are_ignored() -> None:
    assert load(PATH="/bin", TAIL="x") == Delivery()


def test_the_file_is_below_the_environment(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        '[shared]\npartitions = 4\nreplicas = 3\n[delivery]\nport = 1\ndrain = 2\norigins = ["http://a"]\n[models.x]\n',
    )
    env = {"TAILRACE_CONFIG": path, "TAILRACE_DELIVERY_PORT": "7", "TAILRACE_REPLICAS": "1"}
    shared, settings = load_settings(Delivery, "delivery", env)
    assert (shared.partitions, shared.replicas, shared.config) == (4, 1, path)
    assert (settings.port, settings.drain, settings.origins) == (7, 2.0, ["http://a"])


def test_wrong_and_unknown_keys_of_the_file_are_named(tmp_path: Path) -> None:
    path = config(tmp_path, '[shared]\nparitions = 4\n[delivery]\nport = "high"\ncolour = "red"\n')
    assert [p.split(":")[0] for p in problems(TAILRACE_CONFIG=path)] == [
        "[delivery] port",
        "[shared] paritions",
        "[delivery] colour",
    ]


def test_no_file_is_an_empty_one() -> None:
    assert read_config({}) == read_config({"TAILRACE_CONFIG": ""}) == {}


@pytest.mark.parametrize(("content", "reason"), [(b"[x", "is not valid TOML"), (b"a = '\xff'", "is not valid TOML")])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    (problem,) = problems(TAILRACE_CONFIG=str(path))
    assert problem.startswith(f"TAILRACE_CONFIG: {path} {reason}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    assert problems(TAILRACE_CONFIG=str(path)) == [f"TAILRACE_CONFIG: cannot read {path}: No such file or directory"]


def test_settings_become_the_topology() -> None:
    topology = Shared(partitions=2, replicas=3, retention=60.0, log_max_bytes=9, pool="gpu", lease=7.0).topology()
    assert (topology.partitions, topology.replicas, topology.max_age) == (2, 3, 60.0)
    assert (topology.max_bytes, topology.pool, topology.ack_wait) == (9, "gpu", 7.0)
