"""The console's pure modules, run by node; its acceptance rule against the one of ``schemas``."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING, judge
from tests.conftest import require

HERE = Path(__file__).parent
CONSOLE = HERE.parents[3] / "services" / "delivery" / "console"
TYPES = ["started", "delta", "notice", "restarted", "usage", "completed", "failed", "cancelled", "interrupted", "new"]
steps = st.lists(st.tuples(st.sampled_from(TYPES), st.integers(1, 3), st.integers(0, 6)), max_size=30)


@pytest.fixture(scope="module")
def node() -> str:
    path = shutil.which("node")
    require(path, "needs node 20 or later")
    return str(path)


@pytest.fixture(scope="module")
def rule(node: str) -> Iterator["subprocess.Popen[str]"]:
    command = [node, str(HERE / "judge_lines.mjs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("suite", sorted(HERE.glob("*.test.mjs")), ids=lambda path: path.name)
def test_modules_pass_their_suite_under_node(node: str, suite: Path) -> None:
    run = subprocess.run([node, "--test", str(suite)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps)
def test_the_console_accepts_the_same_events_as_schemas_acceptance(
    rule: "subprocess.Popen[str]", sequence: list[tuple[str, int, int]]
) -> None:
    assert rule.stdin is not None
    assert rule.stdout is not None
    rule.stdin.write(json.dumps(sequence) + "\n")
    rule.stdin.flush()
    expected = []
    position = BEGINNING
    for type_, epoch, seq in sequence:
        position, verdict = judge(position, type_, epoch, seq)
        expected.append(verdict.value)
    assert json.loads(rule.stdout.readline()) == expected


def test_the_page_has_no_inline_code_and_no_external_resources() -> None:
    html = (CONSOLE / "index.html").read_text()
    assert "style=" not in html
    assert "<style" not in html
    assert "<script>" not in html
    for file in CONSOLE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, file
        assert "https://" not in text, file
