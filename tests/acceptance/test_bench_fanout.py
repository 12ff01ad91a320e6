"""Test that the fan-out benchmark runs on a real broker, finds no lost event, and reports every figure."""

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.fanout.outcome import FanoutOutcome, FanoutReport
from bench.fanout.targets import NCHAN_MODULE
from tests.conftest import require

pytestmark = pytest.mark.acceptance
ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "fanout", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def outcomes(folder: Path, *arguments: str) -> list[FanoutOutcome]:
    result = bench(*arguments, "--json", str(folder / "fanout.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    report = msgspec.json.decode((folder / "fanout.json").read_bytes(), type=FanoutReport)
    assert report.good
    (scenario,) = report.scenarios
    return scenario.outcomes


def test_a_small_run_finds_every_event_and_reports_every_figure(tmp_path: Path) -> None:
    (own,) = outcomes(tmp_path, "smoke")
    assert (own.streams, own.complete, own.events) == (50, 50, 50 * 60)
    assert (own.missing, own.surplus, own.mismatches, own.problems) == (0, 0, 0, [])
    assert own.latency_ms.p99 > 0
    assert set(own.cpu_us) == {"nats-server", "delivery", "publisher", "client-0", "client-1"}
    assert own.broker is not None
    assert own.counts["events_delivered"] >= own.events


def test_every_protocol_brings_every_event(tmp_path: Path) -> None:
    measured = outcomes(tmp_path, "smoke", *(f"--protocol={name}" for name in ("sse", "websocket", "grpc")))
    assert [each.protocol for each in measured] == ["sse", "websocket", "grpc"]
    assert all(each.complete == 50 and each.events == 50 * 60 for each in measured)


def test_reconnecting_subscribers_miss_no_event(tmp_path: Path) -> None:
    (own,) = outcomes(tmp_path, "storm-5000", "--subscribers", "60", "--events", "40", "--rate", "8")
    assert (own.returns, own.complete, own.events) == (60, 60, 60 * 40)
    assert own.caught_up_ms.p99 > 0


def test_subscribers_resuming_at_any_cursor_of_a_log_miss_no_event(tmp_path: Path) -> None:
    (own,) = outcomes(tmp_path, "storm-log-5000", "--subscribers", "40", "--events", "1010")
    assert (own.returns, own.complete, own.missing, own.surplus) == (40, 40, 0, 0)
    assert own.broker is not None
    assert own.broker.requests > 0


def test_finished_answers_are_replayed_whole(tmp_path: Path) -> None:
    (own,) = outcomes(tmp_path, "replay-1000", "--sessions", "20")
    assert (own.complete, own.events) == (20, 20 * 500)
    assert own.latency_ms.p99 > 0


def test_stalled_clients_do_not_affect_reading_clients(tmp_path: Path) -> None:
    rounds = outcomes(tmp_path, "stuck-100", "--subscribers", "30", "--events", "8020")
    assert [each.round for each in rounds] == ["alone", "beside 100 stuck"] * 2
    assert all(each.complete == 30 and each.events == 30 * 20 for each in rounds)
    assert rounds[1].counts["blocked_writes"] > 0


def test_nchan_is_measured_by_the_same_clients(tmp_path: Path) -> None:
    there = shutil.which("nginx") is not None and NCHAN_MODULE.exists()
    require(there, "nginx with Nchan is not installed (apt-get install nginx-light libnginx-mod-nchan)")
    own, peer = outcomes(tmp_path, "smoke", "--peer", "nchan")
    assert (own.target, peer.target) == ("tailrace", "nchan")
    assert peer.good
    assert set(peer.cpu_us) == {"nginx", "publisher", "client-0", "client-1"}


def test_help_names_scenarios_and_exit_codes() -> None:
    result = bench("--help")
    assert result.returncode == 0
    for word in ("live-10000x5", "storm-5000", "--peer", "--profile", "Exit code"):
        assert word in result.stdout


def test_an_unknown_scenario_is_a_usage_error() -> None:
    result = bench("live-9")
    assert result.returncode == 2
    assert "live-2000x20" in result.stderr
