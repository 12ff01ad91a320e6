"""The command line as a person or a script uses it: a process, its output and its exit code."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.events import (
    Annotation,
    Binary,
    Completed,
    Delta,
    Extra,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Signature,
    Started,
    ToolCall,
)
from tests.support.scripted_delivery import GENERATION, Delivery, serving, story

REPOSITORY = Path(__file__).parents[3]


def environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("TAILRACE_") and k != "NO_COLOR"} | variables


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "services.standalone.cli", *argv]


def tailrace(*argv: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    stream: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        command(*argv),
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **stream,
    )


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*argv),
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def delivery() -> Iterator[Delivery]:
    with serving(Delivery(story("Once ", "upon\u2028", "a tïme."))) as served:
        yield served


def test_ask_prints_the_answer_and_nothing_else(delivery: Delivery) -> None:
    result = tailrace("ask", "tell me", "--url", delivery.url)
    assert (result.returncode, result.stdout, result.stderr) == (0, "Once upon\u2028a tïme.\n", "")
    assert delivery.asked == [{"model": "scripted/story", "messages": [{"role": "user", "content": "tell me"}]}]


def test_ask_sends_model_session_and_system_message(delivery: Delivery) -> None:
    argv = ["--model", "openai/gpt-4o-mini", "--session", "chat", "--system", "be brief", "--json"]
    result = tailrace("ask", "why?", *argv, TAILRACE_URL=delivery.url)
    assert result.returncode == 0
    assert delivery.asked[0]["model"] == "openai/gpt-4o-mini"
    assert delivery.asked[0]["messages"][0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("argv", [["-"], []])
def test_ask_reads_the_question_from_standard_input(delivery: Delivery, argv: list[str]) -> None:
    assert tailrace("ask", *argv, "--url", delivery.url, stdin="from a pipe\n").returncode == 0
    assert delivery.asked[0]["messages"][0]["content"] == "from a pipe"


def test_ask_without_any_question_is_wrong_usage(delivery: Delivery) -> None:
    result = tailrace("ask", "--url", delivery.url, stdin="")
    assert result.returncode == 2
    assert "standard input is empty" in result.stderr
    assert delivery.asked == []


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_wrong_usage(delivery: Delivery, question: str) -> None:
    result = tailrace("ask", question, "--url", delivery.url)
    assert result.returncode == 2
    assert "QUESTION is empty" in result.stderr
    assert delivery.asked == []


def test_ask_sends_parameters_labels_and_an_idempotency_key(delivery: Delivery) -> None:
    argv = ["--max-tokens", "50", "--param", "temperature=0.5", "--param", "stop=END", "--label", "team=blue=1"]
    keyed = ["--session", "chat", "--idempotency-key", "once"]
    assert tailrace("ask", "x", *argv, *keyed, "--url", delivery.url).returncode == 0
    assert delivery.asked[0]["params"] == {"temperature": 0.5, "stop": "END", "max_tokens": 50}
    assert delivery.asked[0]["metadata"] == {"team": "blue=1"}
    assert delivery.keys == ["once"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--param", "temperature"], "'temperature' is not NAME=VALUE"),
        (["--label", "a=1", "--label", "a=2"], "'a' is given twice"),
        (["--max-tokens", "0"], "0 is not in the range"),
        (["--idempotency-key", "k"], "--idempotency-key needs --session"),
    ],
)
def test_wrong_options_of_ask_are_named(delivery: Delivery, argv: list[str], said: str) -> None:
    result = tailrace("ask", "x", *argv, "--url", delivery.url)
    assert (result.returncode, delivery.asked) == (2, [])
    assert said in result.stderr


def test_help_of_ask_documents_that_no_history_is_sent() -> None:
    assert "Its earlier questions and answers are not sent" in " ".join(tailrace("ask", "--help").stdout.split())


def test_tail_reports_that_it_waits_for_a_session_that_does_not_exist(delivery: Delivery) -> None:
    process = start("tail", "nosuch", "--url", delivery.url)
    assert process.stderr is not None
    said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert "there is no session nosuch yet: waiting" in said


def test_a_url_that_is_not_deliverys_is_reported(delivery: Delivery) -> None:
    delivery.problem = (404, {"type": "urn:tailrace:problem:not-found", "title": "T", "detail": "Not Found"})
    result = tailrace("ask", "x", "--session", "s", "--url", delivery.url)
    assert result.returncode == 1
    assert f"{delivery.url} does not serve /v1/sessions/s/generations: is it the address of delivery?" in result.stderr


def test_topology_without_a_broker_fails_soon_and_in_one_line() -> None:
    begun = time.monotonic()
    result = tailrace("topology", "apply", TAILRACE_NATS_URL="nats://127.0.0.1:9")
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert "no NATS server answers at nats://127.0.0.1:9" in result.stderr
    assert time.monotonic() - begun < 25


def test_status_reports_each_unreachable_service(delivery: Delivery) -> None:
    nowhere = "http://127.0.0.1:9"
    result = tailrace("status", "--url", nowhere, "--billing-url", nowhere, "--producer-url", nowhere)
    assert result.returncode == 3
    assert result.stdout.count("unreachable") == 3
    result = tailrace("status", "--url", delivery.url, "--billing-url", nowhere, "--producer-url", nowhere)
    assert "does not answer like Tailrace" in result.stdout
    assert result.returncode == 1


def test_doctor_reports_every_problem_it_finds(tmp_path: Path) -> None:
    config = tmp_path / "tailrace.toml"
    config.write_text("[shared\n")
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    (data / "billing.db").write_bytes(b"this is no database" * 100)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = ["doctor", "--data", str(data), "--config", str(config), "--json"]
        result = tailrace(*argv, TAILRACE_DELIVERY_PORT=port, OPENAI_API_KEY="sk-secret")
    assert result.returncode == 1
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert {name for name, finding in findings.items() if finding["level"] == "problem"} >= {
        "billing.db",
        "port of delivery",
        "settings",
    }
    assert "tailrace billing rebuild" in findings["billing.db"]["text"]
    assert "not valid TOML" in findings["settings"]["text"]
    assert findings["provider keys"]["text"] == "OPENAI_API_KEY"
    assert "sk-secret" not in result.stdout


def test_doctor_has_no_problem_with_a_new_folder(tmp_path: Path) -> None:
    ports = {f"TAILRACE_{name}_PORT": "0" for name in ("DELIVERY", "DELIVERY_GRPC", "BILLING", "PRODUCER", "NATS")}
    result = tailrace("doctor", "--data", str(tmp_path / "new"), **ports)
    assert result.returncode == 0, result.stdout
    assert "PROBLEM" not in result.stdout
    assert not (tmp_path / "new").exists()


def test_tokens_appear_while_the_generation_still_runs(delivery: Delivery) -> None:
    delivery.until_cancelled = True
    process = start("ask", "x", "--url", delivery.url)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 5) == b"Once "
    delivery.cancelled.set()
    process.communicate(timeout=20)


def test_answer_is_whole_after_lost_connections(delivery: Delivery) -> None:
    delivery.cuts = [2, 2, 3, 4]
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stdout) == (0, "Once upon\u2028a tïme.\n")
    assert delivery.resumed_from == ["c0", "c2", "c2", "c3", "c4"]


def test_events_sent_twice_are_shown_once(delivery: Delivery) -> None:
    delivery.cuts, delivery.repeat = [2, 3], True
    assert tailrace("ask", "x", "--url", delivery.url).stdout == "Once upon\u2028a tïme.\n"


def test_service_that_drains_or_is_busy_is_resumed(delivery: Delivery) -> None:
    delivery.byes, delivery.busy = 2, 1
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stdout) == (0, "Once upon\u2028a tïme.\n")


def test_json_prints_each_event_as_it_is_stored(delivery: Delivery) -> None:
    result = tailrace("ask", "x", "--json", "--url", delivery.url)
    events = [json.loads(line) for line in result.stdout.split("\n")[:-1]]
    assert [event["type"] for event in events] == ["started", "delta", "delta", "delta", "completed"]
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("terminal", "code", "said"),
    [
        (Failed(generation=GENERATION, seq=0, code="upstream_cut_off", message="no end marker"), 1, "upstream_cut_off"),
        (Interrupted(generation=GENERATION, seq=0, reason="producer_lost"), 1, "interrupted"),
    ],
)
def test_exit_code_follows_the_terminal(delivery: Delivery, terminal: Any, code: int, said: str) -> None:
    delivery.events = story("some", end=terminal)
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stdout) == (code, "some\n")
    assert said in result.stderr


def test_ctrl_c_cancels_the_generation_and_shows_its_end(delivery: Delivery) -> None:
    delivery.until_cancelled = True
    process = start("ask", "x", "--url", delivery.url)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 5) == b"Once "
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert delivery.cancels == [GENERATION]
    assert "cancelled" in err
    assert "Traceback" not in err


def test_second_ctrl_c_leaves_at_once(delivery: Delivery) -> None:
    delivery.until_cancelled = True
    delivery.events = story("a")
    delivery.cancelled = NeverSet()
    process = start("ask", "x", "--url", delivery.url)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1) == b"a"
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 20
    while not delivery.cancels and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


class NeverSet:
    """An event that a cancel request does not set, so that the generation continues."""

    def __init__(self) -> None:
        self._closing = False

    def set(self) -> None:
        pass

    def wait(self, timeout: float) -> None:
        time.sleep(min(timeout, 3))


def test_an_unreachable_url_is_reported_with_exit_code_3() -> None:
    for argv in (["ask", "x"], ["tail", "s"], ["sessions"], ["cancel", "s"]):
        result = tailrace(*argv, "--url", "http://127.0.0.1:9")
        assert result.returncode == 3, argv
        assert "nothing answers at http://127.0.0.1:9" in result.stderr
        assert "Traceback" not in result.stderr


def test_problem_detail_of_the_service_is_shown(delivery: Delivery) -> None:
    delivery.problem = (422, {"type": "urn:tailrace:problem:unknown-model", "title": "T", "detail": "no model 'x'"})
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stderr) == (1, "error: T: no model 'x'\n")


def test_server_that_is_not_tailrace_is_reported(delivery: Delivery) -> None:
    delivery.problem = (200, {})
    result = tailrace("ask", "x", "--url", delivery.url)
    assert result.returncode == 1
    assert "does not answer like Tailrace" in result.stderr


def test_unusable_address_and_name_are_wrong_usage() -> None:
    assert tailrace("tail", "a.b").returncode == 2
    result = tailrace("sessions", "--url", "nonsense")
    assert "is not a valid address" in result.stderr
    assert "Traceback" not in result.stderr


def test_reasoning_notices_and_tool_calls_stay_out_of_the_piped_answer(delivery: Delivery) -> None:
    events = [
        Started(generation=GENERATION, seq=0, model="m", provider="p", upstream_model="m"),
        Notice(generation=GENERATION, seq=1, code="retrying", message="asking again"),
        Delta(generation=GENERATION, seq=2, reasoning="let me see"),
        Delta(generation=GENERATION, seq=3, text="Answer"),
        Delta(generation=GENERATION, seq=4, tool_call=ToolCall(index=0, id="c", name="weather", arguments='{"a":')),
        Delta(generation=GENERATION, seq=5, tool_call=ToolCall(index=0, arguments="1}")),
        Completed(generation=GENERATION, seq=6, finish_reason="tool_calls"),
    ]
    delivery.events = events
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stdout) == (0, "Answer\n")
    assert result.stderr == 'asking again\nlet me see\n→ weather {"a":1}\n'


def test_a_refusal_is_printed_to_stdout_and_files_and_sources_to_stderr(delivery: Delivery) -> None:
    png = {"media_type": "image/png"}
    delivery.events = [
        Started(generation=GENERATION, seq=0, model="m", provider="p", upstream_model="m"),
        Delta(generation=GENERATION, seq=1, refusal="I can"),
        Delta(generation=GENERATION, seq=2, refusal="not."),
        Delta(generation=GENERATION, seq=3, binary=Binary(**png, data=b"ab")),
        Delta(generation=GENERATION, seq=4, binary=Binary(**png, data=b"c", continues=True)),
        Delta(generation=GENERATION, seq=5, annotation=Annotation(kind="k", url="https://h", title="H", number=1)),
        Delta(generation=GENERATION, seq=6, signature=Signature(kind="thinking", data="c2ln")),
        Delta(generation=GENERATION, seq=7, extra=Extra(kind="executed_tools", data=[1])),
        Completed(generation=GENERATION, seq=8, finish_reason="stop"),
    ]
    result = tailrace("ask", "x", "--url", delivery.url)
    assert (result.returncode, result.stdout) == (0, "I cannot.\n")
    assert result.stderr == "[image/png, 3 bytes]\n[1] H · https://h\n[executed_tools]\n"


def test_restart_is_reported_and_the_answer_is_printed_again(delivery: Delivery) -> None:
    delivery.events = [
        Started(generation=GENERATION, seq=0, model="m", provider="p", upstream_model="m"),
        Delta(generation=GENERATION, seq=1, text="old"),
        Restarted(generation=GENERATION, seq=2, epoch=2, reason="producer_lost"),
        Delta(generation=GENERATION, seq=3, text="zombie"),
        Delta(generation=GENERATION, seq=3, epoch=2, text="new"),
        Completed(generation=GENERATION, seq=4, epoch=2, finish_reason="stop"),
    ]
    result = tailrace("ask", "x", "--url", delivery.url)
    assert result.stdout == "old\nnew\n"
    assert "begins again (producer_lost)" in result.stderr


def on_a_terminal(*argv: str, **variables: str) -> tuple[int, str]:
    """Run on a pseudo-terminal; return the exit code and all that was shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*argv),
        cwd=REPOSITORY,
        env=environment(TERM="xterm", **variables),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    return process.wait(20), shown.decode().replace("\r\n", "\n")


def test_terminal_gets_dim_reasoning_and_no_control_characters_of_the_answer(delivery: Delivery) -> None:
    delivery.events = story("x", "red \x1b[31m\x07")
    delivery.events[1] = Delta(generation=GENERATION, seq=1, reasoning="hm")
    code, shown = on_a_terminal("ask", "x", "--url", delivery.url)
    assert (code, shown) == (0, "\x1b[2mhm\x1b[0m\x1b[2m\n\x1b[0mred �[31m�\n")


def test_no_color_switches_escape_codes_off(delivery: Delivery) -> None:
    delivery.events[1] = Delta(generation=GENERATION, seq=1, reasoning="hm")
    delivery.documents["/v1/sessions"] = SESSIONS
    assert "\x1b" not in on_a_terminal("ask", "x", "--url", delivery.url, NO_COLOR="1")[1]
    assert "\x1b" not in on_a_terminal("sessions", "--url", delivery.url, NO_COLOR="1")[1]


SESSIONS = {
    "sessions": [
        {"session": "s" * 64, "generations": 1200, "last_state": "running", "model": "[red]m" * 30, "updated_at": 1.5},
        {"session": "b", "generations": 1, "last_state": "completed", "model": None, "updated_at": 2.0},
    ],
    "next": None,
}


def test_sessions_are_a_table_without_cuts_or_colours_in_a_pipe(delivery: Delivery) -> None:
    delivery.documents["/v1/sessions"] = SESSIONS
    result = tailrace("sessions", "--url", delivery.url, FORCE_COLOR="1")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["session", "s" * 64, "b"]
    assert "[red]m" * 30 in lines[1]
    assert "1,200" in lines[1]
    assert "\x1b" not in result.stdout
    assert json.loads(tailrace("sessions", "--json", "--url", delivery.url).stdout)["sessions"] == SESSIONS["sessions"]


def test_cancel_without_a_generation_cancels_all_unfinished_generations(delivery: Delivery) -> None:
    states = {"gen_1": "completed", "gen_2": "running", "gen_3": "queued"}
    generations = [{"generation": name, "state": state} for name, state in states.items()]
    delivery.documents["/v1/sessions/chat"] = {"session": "chat", "generations": generations}
    result = tailrace("cancel", "chat", "--url", delivery.url)
    assert result.returncode == 0
    assert delivery.cancels == ["gen_2", "gen_3"]
    assert result.stdout == "gen_2  cancelling\ngen_3  cancelling\n"


def test_cancel_of_an_unknown_session_fails(delivery: Delivery) -> None:
    result = tailrace("cancel", "nobody", "--url", delivery.url)
    assert (result.returncode, result.stderr) == (1, "error: There is no such thing\n")


def test_tail_follows_over_a_lost_connection_until_interrupted(delivery: Delivery) -> None:
    delivery.cuts = [3]
    process = start("tail", "chat", "--json", "--from", "start", "--url", delivery.url)
    assert process.stdout is not None
    types = [json.loads(process.stdout.readline())["type"] for _ in range(5)]
    assert types == ["started", "delta", "delta", "delta", "completed"]
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_tail_after_a_cursor_begins_in_the_middle(delivery: Delivery) -> None:
    process = start("tail", "chat", "--after", "c3", "--url", delivery.url)
    assert process.stdout is not None
    assert process.stdout.readline() == "a tïme.\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert delivery.resumed_from[0] == "c3"


TOTALS = {"generations": 2, "output": 1500, "counted_output": 1500}
USED = {
    "generation": "gen_1",
    "model": "m",
    "state": "completed",
    "status": "matched",
    "counted": {"input": 8, "output": 300},
    "reported": None,
}


def test_usage_is_summed_by_model_or_listed_for_a_session(delivery: Delivery) -> None:
    rows = [{"key": {"model": "scripted/story"}, "totals": TOTALS}]
    delivery.documents["/v1/usage"] = {"group_by": ["model"], "rows": rows, "next": None}
    delivery.documents["/v1/usage/sessions/chat"] = {"totals": TOTALS, "generations": [USED], "next": None}
    summed = tailrace("usage", TAILRACE_BILLING_URL=delivery.url)
    assert [line.split() for line in summed.stdout.splitlines()] == [
        ["model", "generations", "output", "counted", "output"],
        ["scripted/story", "2", "1,500", "1,500"],
    ]
    listed = tailrace("usage", "chat", "--billing-url", delivery.url)
    assert listed.stdout.splitlines()[1].split() == ["gen_1", "m", "completed", "matched", "8", "300"]
    assert "total: generations 2, output 1,500" in listed.stderr
    as_json = tailrace("usage", "--json", "--billing-url", delivery.url)
    assert json.loads(as_json.stdout) == delivery.documents["/v1/usage"]


def test_output_closed_early_ends_quietly(delivery: Delivery) -> None:
    delivery.events = story(*["many words "] * 20_000)
    process = start("ask", "x", "--url", delivery.url)
    assert process.stdout is not None
    assert process.stdout.read(5) == "many "
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_names_the_command(shell: str) -> None:
    result = tailrace("completion", shell)
    assert result.returncode == 0
    assert "_TAILRACE_COMPLETE" in result.stdout


def test_completion_offers_sessions(delivery: Delivery) -> None:
    delivery.documents["/v1/sessions"] = SESSIONS
    result = tailrace(
        _TAILRACE_COMPLETE="bash_complete",
        COMP_WORDS=f"tailrace tail --url {delivery.url} b",
        COMP_CWORD="4",
    )
    assert result.stdout == "plain,b\n"


def test_version_is_printed() -> None:
    assert tailrace("--version").stdout.startswith("tailrace, version ")


def test_a_session_is_deleted_after_a_yes(delivery: Delivery) -> None:
    result = tailrace("sessions", "delete", "chat", "--yes", "--url", delivery.url)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "session chat is deleted\n")
    assert tailrace("sessions", "delete", "chat", "--yes", "--cancel", "--url", delivery.url).returncode == 0
    assert delivery.deleted == ["/v1/sessions/chat", "/v1/sessions/chat?cancel=true"]


def test_delete_without_a_terminal_requires_yes(delivery: Delivery) -> None:
    result = tailrace("sessions", "delete", "chat", "--url", delivery.url)
    assert (result.returncode, "--yes" in result.stderr, delivery.deleted) == (2, True, [])


def test_a_refused_deletion_reports_the_running_generation(delivery: Delivery) -> None:
    delivery.problem = (409, {"title": "The session is in use", "detail": "gen_1 has not ended"})
    result = tailrace("sessions", "delete", "chat", "--yes", "--url", delivery.url)
    assert result.returncode != 0
    assert "gen_1 has not ended" in result.stderr
