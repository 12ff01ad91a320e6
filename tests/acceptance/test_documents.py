"""Check the documents: links resolve, tables agree with the code, commands work.

Shell blocks marked ``sh`` are run here, all of one document in one shell, against ``tailrace up``. Blocks marked
``console`` hold commands that start or check whole deployments; another test or the CI script runs each of them.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client
import pytest

import services.billing.metrics
import services.delivery.metrics
import services.kit.jetstream.logs
import services.kit.jetstream.storage
import services.producer.metrics
from bench.processes import free_port
from schemas.events import AnyEvent
from services.billing.settings import Settings as BillingSettings
from services.delivery.settings import Settings as DeliverySettings
from services.kit.settings import Shared
from services.producer.core.registry import Registry
from services.producer.settings import Settings as ProducerSettings
from tests.conftest import require
from tests.support.service_processes import REPOSITORY, clean_environment, running

pytestmark = pytest.mark.acceptance

EXCLUDED = {".venv", ".venv-model", "node_modules", ".tailrace", ".pytest_cache", "build"}
DOCUMENTS = sorted(
    path for path in REPOSITORY.rglob("*.md") if not EXCLUDED.intersection(path.relative_to(REPOSITORY).parts)
)
ELSEWHERE = {
    "make up": "tests/acceptance/test_documents.py",
    "make up CLUSTER=3": "tests/integration/standalone/test_cluster_up.py",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    ".venv/bin/python -m grpc_tools.protoc -I schemas/rpc --python_out=schemas/rpc --pyi_out=schemas/rpc "
    "tailrace/v1/tailrace.proto": "tests/contracts/delivery/test_grpc_protocol.py",
    "docker compose up --build --wait -d": "tests/acceptance/test_compose.py",
    "docker compose down": "tests/acceptance/test_compose.py",
}
OTHERS = {
    "docs/benchmarks.md": "tests/acceptance/test_bench.py",
    "docs/chaos.md": "tests/acceptance/test_chaos.py",
}
SETTINGS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "Shared": (Shared, "TAILRACE_"),
    "Producer": (ProducerSettings, "TAILRACE_PRODUCER_"),
    "Delivery": (DeliverySettings, "TAILRACE_DELIVERY_"),
    "Billing": (BillingSettings, "TAILRACE_BILLING_"),
}


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as code forges make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_internal_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_every_decision_record_is_in_the_index() -> None:
    folder = REPOSITORY / "docs" / "adr"
    index = (folder / "README.md").read_text()
    pages = [path.name for path in folder.glob("[0-9]*.md")]
    assert pages
    assert [page for page in pages if f"({page})" not in index] == []


def _documented_settings(heading: str) -> dict[str, str]:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| `(TAILRACE_\w+)` \| (?:`([^`]*)`)? ?\| .+ \|$", section[1], flags=re.MULTILINE)
    return dict(rows)


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case list() | tuple():
            return ",".join(value)
        case _:
            return str(value)


@pytest.mark.parametrize("heading", SETTINGS)
def test_the_table_of_settings_matches_the_code(heading: str) -> None:
    struct, prefix = SETTINGS[heading]
    defaults = struct()
    fields = [field.name for field in msgspec.structs.fields(struct)]
    assert _documented_settings(heading) == {prefix + f.upper(): _shown(getattr(defaults, f)) for f in fields}


def test_the_configuration_files_in_the_documents_are_accepted() -> None:
    for text in blocks(REPOSITORY / "docs" / "configuration.md", "toml"):
        config = tomllib.loads(text)
        for table, (struct, _) in (("shared", SETTINGS["Shared"]), ("delivery", SETTINGS["Delivery"])):
            msgspec.convert(config.get(table, {}), struct)
        registry = Registry.load(config, {"OPENAI_API_KEY": "test"})
        assert set(registry.aliases) == set(config.get("models", {}))


def test_every_metric_in_the_documents_exists() -> None:
    assert services.producer.metrics
    assert services.delivery.metrics
    assert services.billing.metrics
    families = {family.name: family.type for family in prometheus_client.REGISTRY.collect()}
    known = {n + ("_total" if kind == "counter" else "") for n, kind in families.items()}
    mentioned = {
        n for d in DOCUMENTS for n in re.findall(r"`(tailrace_(?:producer|delivery|billing)_\w+)", d.read_text())
    }
    assert mentioned
    assert mentioned - known == set()


def test_every_event_type_is_documented_in_the_protocol() -> None:
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    for event in AnyEvent.__args__:
        row = re.search(rf"^\| `{event.__struct_config__.tag}` \| (.*?) \|", text, flags=re.MULTILINE)
        assert row is not None, event
        own = set(event.__struct_fields__) - {"generation", "seq", "epoch", "at", "v"}
        if event.__struct_config__.tag != "notice":
            documented = set(re.findall(r"`(\w+)`", row[1]))
            assert own == documented, event.__struct_config__.tag


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_tested_elsewhere_are_in_the_named_file(document: Path) -> None:
    commands = [line for block in blocks(document, "console") for line in block.splitlines()]
    assert [command for command in commands if command not in ELSEWHERE] == []
    for command in commands:
        runner = (REPOSITORY / ELSEWHERE[command]).read_text()
        assert all(f'"{w}"' in runner for w in command.split()[1:]) or command in runner, command


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """``make up`` on free ports; yields the addresses as documents write them, and where they are now."""
    require(shutil.which("make"), "make is not installed")
    installed = subprocess.run(["make", "-q", ".venv/.requirements"], cwd=REPOSITORY, check=False, capture_output=True)
    require(installed.returncode == 0, "what make installs is not up to date (run: make test)")
    folder = tmp_path_factory.mktemp("up")
    services = ("DELIVERY", "DELIVERY_GRPC", "BILLING", "PRODUCER", "NATS")
    ports = {f"TAILRACE_{service}_PORT": str(free_port()) for service in services}
    addresses = {
        "http://127.0.0.1:8080": f"http://127.0.0.1:{ports['TAILRACE_DELIVERY_PORT']}",
        "http://127.0.0.1:8081": f"http://127.0.0.1:{ports['TAILRACE_BILLING_PORT']}",
    }
    env = clean_environment(TAILRACE_DATA=str(folder / "data"), **ports)
    with running(["make", "up", "ARGS="], env, folder / "up.log", f"{addresses['http://127.0.0.1:8080']}/readyz"):
        yield addresses


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "sh") and name(d) not in OTHERS], ids=name)
def test_the_commands_of_a_document_work(document: Path, everything: dict[str, str], tmp_path: Path) -> None:
    script = "\n".join(blocks(document, "sh"))
    for written, real in everything.items():
        script = script.replace(written, real)
    env = clean_environment(
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        TAILRACE_URL=everything["http://127.0.0.1:8080"],
        TAILRACE_BILLING_URL=everything["http://127.0.0.1:8081"],
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "urn:tailrace:problem" not in done.stdout


def test_every_document_with_other_commands_has_its_own_test() -> None:
    for document, test in OTHERS.items():
        if (REPOSITORY / document).exists():
            assert (REPOSITORY / test).exists()
