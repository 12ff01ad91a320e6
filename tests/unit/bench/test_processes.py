"""The processes of a benchmark."""

from pathlib import Path

import psutil
import pytest

from bench.processes import Process, Processes


def test_a_second_interruption_while_stopping_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, interrupted = Process.stop, []

    def interrupted_once(process: Process, **options: float) -> None:
        if not interrupted:
            interrupted.append(process.name)
            raise KeyboardInterrupt
        stop(process, **options)  # type: ignore[arg-type]

    processes = Processes(tmp_path, {})
    pids = [processes.start(name, ["sleep", "60"]).pid for name in ("one", "two", "three")]
    monkeypatch.setattr(Process, "stop", interrupted_once)
    processes.__exit__(None, None, None)
    assert interrupted == ["three"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
