"""Test that the benchmark runs, finds every text identical, and reports every figure."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.relay.report import Report
from services.kit.stages import STAGES

pytestmark = pytest.mark.acceptance
ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_small_run_finds_every_text_identical_and_reports_every_figure(tmp_path: Path) -> None:
    result = bench("relay", "smoke", "--subscribers", "2", "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    report = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Report)
    assert report.good
    assert report.machine.cores > 0
    (scenario,) = report.scenarios
    direct, tailrace = scenario.outcomes
    assert (direct.target, direct.streams, direct.complete, direct.mismatches) == ("direct", 5, 5, 0)
    assert (tailrace.target, tailrace.streams, tailrace.complete, tailrace.mismatches) == ("tailrace", 10, 10, 0)
    assert tailrace.tokens_delivered == 2 * tailrace.tokens_produced == 400
    assert set(tailrace.processes) == {"provider", "nats-server", "producer", "delivery", "billing", "client-0"}
    assert all(cost.peak_rss_mb > 1 for cost in tailrace.processes.values())
    assert tailrace.settled_s is not None
    assert tailrace.tokens_per_s > 0
    assert set(scenario.added_ms) == {"tailrace"}
    assert "added" in result.stdout
    assert "sum of its 4" in result.stdout


def test_a_provider_alone_is_measured_without_a_broker(tmp_path: Path) -> None:
    result = bench("relay", "smoke", "--target", "direct", "--clients", "2", "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    (scenario,) = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Report).scenarios
    (direct,) = scenario.outcomes
    assert direct.tokens_delivered == direct.tokens_produced == direct.events == 200
    assert set(direct.processes) == {"provider", "client-0", "client-1"}


def test_open_loop_answers_arrive_whole_or_cancelled_and_the_stages_are_measured(tmp_path: Path) -> None:
    result = bench("relay", "open-smoke", "--stages", "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    (scenario,) = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Report).scenarios
    direct, tailrace = scenario.outcomes
    assert (direct.starts, direct.failed) == (tailrace.starts, 0)
    assert tailrace.starts == tailrace.complete + tailrace.cancelled > 5
    assert tailrace.failed == tailrace.mismatches == 0
    assert tailrace.first_ms.p99 > 0
    assert tuple(tailrace.stages_ms) == STAGES
    assert set(tailrace.cpu_ms_per_start) == {"nats-server", "producer", "delivery", "billing"}
    assert "stage of a start" in result.stdout


def test_help_names_scenarios_and_exit_codes() -> None:
    result = bench("relay", "--help")
    assert result.returncode == 0
    for word in ("paced-200x2", "flat-20", "--peer", "--profile", "Exit code"):
        assert word in result.stdout


def test_an_unknown_scenario_is_a_usage_error() -> None:
    result = bench("relay", "paced-9")
    assert result.returncode == 2
    assert "paced-200" in result.stderr
