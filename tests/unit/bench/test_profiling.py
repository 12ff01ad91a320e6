"""Test that a profile counts working code and not waiting threads."""

from pathlib import Path

from bench.profiling import top_costs


def test_native_time_belongs_to_the_python_function_that_calls_it_and_waiting_counts_nothing(tmp_path: Path) -> None:
    folded = tmp_path / "x.folded"
    folded.write_text(
        "main (a.py:1);work (a.py:5);write (libc.so.6) 6\n"
        "main (a.py:1);work (a.py:5) 2\n"
        "main (a.py:1) 2\n"
        "main (a.py:1);epoll_pwait (libc.so.6) 50\n"
        "thread (b.py:1);lock_PyThread_acquire_lock (x.so);PyThread_acquire_lock_timed (x.so);0x7f (libc.so.6) 90\n"
    )
    found = {share.name: (share.own, share.total) for share in top_costs(folded)}
    assert found == {
        "work (a.py:5)": (80.0, 80.0),
        "main (a.py:1)": (20.0, 100.0),
        "write (libc.so.6)": (60.0, 60.0),
    }
