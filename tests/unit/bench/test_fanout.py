"""Test that the clients of the fan-out benchmark count exactly and detect every fault of a stream."""

import socket
import threading
from array import array
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fanout.crowd import Checker, Crowd
from bench.fanout.events import MARK, closing, event, opening, text
from bench.fanout.protocols import PROTOCOLS
from bench.fanout.publisher import PostSink
from bench.fanout.report import checks
from bench.fanout.scenarios import SCENARIOS, Plan
from bench.fanout.targets import NCHAN_MODULE, Nchan
from bench.harness import chosen_scenarios
from bench.peers import PeerNotInstalled

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def plan(port: int = 1, **changes: object) -> Plan:
    made = Plan(
        kind="live",
        protocol="sse",
        port=port,
        first=0,
        stop=4,
        base=0,
        sessions=2,
        events=5,
        history=0,
        live=False,
        samples=2,
        within=1.0,
        at_once=2,
        deadline=10.0,
        stamps="",
        latencies="",
        go="",
        ready="",
        result="",
    )
    return msgspec.structs.replace(made, **changes)


def framed(records: list[bytes]) -> bytes:
    """Events as delivery frames them, each a chunk of its own."""
    frames = [b"id: c.%d\ndata: %b\n\n" % (number, data) for number, data in enumerate(records)]
    return b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames)


def answer(session: int, indices: list[int]) -> bytes:
    return HEAD + framed([opening(session, 1.0), *(event(session, index, 1.0) for index in indices)])


def checked(data: bytes, number: int = 0) -> Checker:
    took: array[int] = array("q")
    checker = Checker(plan(), number, memoryview(array("q", [7] * 10)), took)
    checker.call()
    checker.take(data, 10)
    return checker


def test_the_marker_is_in_every_event_once_and_in_nothing_else() -> None:
    for index in range(500):
        assert event(3, index, 1.0).count(MARK) == 1
    assert MARK not in opening(3, 1.0) + closing(3, 9, 1.0) + HEAD


def test_a_complete_stream_passes_the_check() -> None:
    checker = checked(answer(0, [0, 1, 2, 3, 4]))
    assert (checker.seen, checker.surplus, checker.differs, checker.cursor) == (5, 0, "", b"c.5")


@pytest.mark.parametrize(
    ("indices", "surplus", "differs"), [([0, 1, 1, 2], 1, False), ([0, 2], 0, True), ([1], 0, True)]
)
def test_repeated_and_missing_events_are_noticed(indices: list[int], surplus: int, differs: bool) -> None:
    checker = checked(answer(0, indices))
    assert (checker.surplus, bool(checker.differs)) == (surplus, differs)


def test_the_text_of_another_session_is_noticed() -> None:
    assert checked(answer(0, [0]), number=1).differs
    assert text(0, 0) != text(1, 0)


@given(st.lists(st.integers(1, 60), max_size=40))
def test_a_stream_is_read_the_same_under_every_chunking(sizes: list[int]) -> None:
    data, checker = answer(0, [0, 1, 2, 3, 4]), checked(b"")
    for size in sizes:
        checker.take(data[:size], 10)
        data = data[size:]
    checker.take(data, 10)
    assert (checker.seen, checker.differs) == (5, "")


@given(st.lists(st.integers(1, 25), max_size=60), st.integers(0, 20))
def test_publish_acknowledgements_are_counted_under_every_chunking(sizes: list[int], refused: int) -> None:
    one = b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\nok"
    data, sink = one * 20 + b"HTTP/1.1 413 Too large\r\ncontent-length: 0\r\n\r\n" * refused, PostSink()
    for _ in range(20):
        sink.sent()
    for size in sizes:
        sink.data_received(data[:size])
        data = data[size:]
    sink.data_received(data)
    assert (sink.under_way, sink.refused) == (0, refused)


def serve(answers: list[bytes]) -> int:
    """Serve each connection an answer, in turn, and close it; return the port."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server:
            for data in answers:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(data)

    threading.Thread(target=run, daemon=True).start()
    return int(server.getsockname()[1])


def crowd(answers: list[bytes], tmp_path: Path) -> Crowd:
    made = Crowd(plan(serve(answers)), memoryview(array("q", [7] * 10)))
    made.open()
    made.run(float("inf"), 0.0)
    return made


def test_every_connection_of_a_crowd_is_counted(tmp_path: Path) -> None:
    whole = [0, 1, 2, 3, 4]
    result = crowd([answer(n % 2, whole) for n in range(4)], tmp_path).result()
    assert (result.streams, result.complete, result.events, result.missing, result.surplus) == (4, 4, 20, 0, 0)
    assert result.mismatches == 0


def test_a_connection_that_ends_early_is_reported_with_its_missing_events(tmp_path: Path) -> None:
    whole = [0, 1, 2, 3, 4]
    result = crowd([answer(0, whole), answer(1, [0, 1]), answer(0, whole), answer(1, whole)], tmp_path).result()
    assert (result.complete, result.missing) == (3, 3)
    assert "ended after 2 events" in result.problems[0]


def test_a_refused_connection_is_reported_with_its_answer(tmp_path: Path) -> None:
    refusal = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    result = crowd([refusal, refusal, refusal, refusal], tmp_path).result()
    assert result.complete == 0
    assert "503" in result.problems[0]


def test_all_stands_for_every_scenario_but_the_smallest() -> None:
    assert {s.name for s in chosen_scenarios(SCENARIOS, ("all",), {})} == set(SCENARIOS) - {"smoke"}


def test_without_outcomes_no_target_is_reported() -> None:
    assert checks(SCENARIOS["live-2000x20"], []) == {}


def test_a_missing_nchan_is_reported_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerNotInstalled, match="libnginx-mod-nchan"):
        Nchan().install()
    assert NCHAN_MODULE.name == "ngx_nchan_module.so"


def test_every_protocol_names_its_session_when_it_begins() -> None:
    for dialect in PROTOCOLS.values():
        stream = dialect.stream("fan-3", b"", False)
        stream.feed(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        assert b"fan-3" in dialect.call("fan-3", b"", False) + stream.replies


def message(body: bytes) -> bytes:
    """A server's WebSocket frame."""
    return b"\x81" + (bytes([len(body)]) if len(body) < 126 else b"\x7e" + len(body).to_bytes(2, "big")) + body


@given(st.lists(st.integers(1, 60), max_size=40))
def test_messages_of_a_socket_are_read_under_every_chunking(sizes: list[int]) -> None:
    events = b",".join(b'{"cursor":"c%d","event":%b}' % (index, event(0, index, 1.0)) for index in range(5))
    data = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + message(
        b'{"type":"subscribed","session":"fan-0","cursor":"c"}'
    )
    data += message(b'{"type":"events","session":"fan-0","events":[%b]}' % events) + message(b'{"type":"ping","id":7}')
    checker = Checker(plan(protocol="websocket"), 0, memoryview(array("q", [7] * 10)), array("q"))
    checker.call()
    for size in sizes:
        checker.take(data[:size], 10)
        data = data[size:]
    checker.take(data, 10)
    assert (checker.seen, checker.differs, checker.cursor) == (5, "", b"c4")
    assert checker.stream.replies.endswith(b'{"type":"pong","id":7}')
