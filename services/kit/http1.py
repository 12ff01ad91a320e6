"""HTTP/1.1 and WebSockets: uvicorn's protocols, with bounded heads, and messages framed once for all recipients."""

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final

import structlog
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from services.kit.http1_sender import FRAMES, Sender
from services.kit.problem import Problem, problem_bytes, problem_headers, send_problem
from services.kit.request_head import wrong_coding, wrong_host

__all__ = ["HEAD_BYTES", "Http1Server"]

log = structlog.get_logger()
HEAD_BYTES: Final = 16_384
HEAD_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 75  # longer than that of proxies, so that none sends a request into a closing connection
LINGER_SECONDS: Final = 5.0
DRAIN_BYTES: Final = 64 * 1024 * 1024  # of a body that is no longer read
DRAIN_SECONDS: Final = 10.0
PIPELINED: Final = 32  # requests that wait for earlier responses
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4
_CLOSE: Final = {"Connection": "close"}
_MALFORMED: Final = Problem(400, "this is not valid HTTP/1.1 or HTTP/2", slug="malformed", headers=_CLOSE)
_TOO_LARGE: Final = Problem(431, f"the request's line and headers have more than {HEAD_BYTES} bytes", headers=_CLOSE)
_BUSY: Final = Problem(503, "too many requests are under way", headers={"Retry-After": "1", **_CLOSE})
_FAILED: Final = Problem(500, "the error has been logged", headers=_CLOSE)


class Http1Server:
    """Serve ``app`` (ASGI) on connections accepted elsewhere; `protocol` is their protocol factory.

    A connection that speaks HTTP/2 goes to ``hand_over``, with the bytes already read. ``limit``: concurrent requests
    and WebSockets; further ones get 503. ``message_bytes``: the largest message of a WebSocket.
    """

    def __init__(
        self, app: Any, limit: int, hand_over: Callable[[asyncio.Transport, bytes], None], *, message_bytes: int
    ) -> None:
        self.limit = limit
        self.hand_over = hand_over
        self.config = Config(
            app,
            http=_Connection,
            ws=_Socket,
            ws_max_size=message_bytes,
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="error",  # below it, URLs are logged with their query
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
        )
        self.config.load()
        self.state = ServerState()

    def protocol(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return _Connection(self)

    async def keep_date(self) -> None:
        """Keep the ``Date`` header current, until cancelled."""
        while True:
            self.state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            await asyncio.sleep(1.0)

    async def close(self, seconds: float) -> None:
        """Close idle connections, wait up to ``seconds`` for open responses, then close the rest."""
        for connection in tuple(self.state.connections):
            connection.shutdown()
        if self.state.tasks:
            await asyncio.wait(self.state.tasks, timeout=seconds)
        await asyncio.sleep(0)
        for connection in tuple(self.state.connections):
            if not self._is_leaving(connection.transport):
                connection.transport.abort()

    @staticmethod
    def _is_leaving(transport: asyncio.Transport) -> bool:
        return transport.is_closing() and not transport.get_write_buffer_size()

    @property
    def is_busy(self) -> bool:
        """Return whether the limit of concurrent requests is reached."""
        return len(self.state.tasks) >= self.limit


class _Connection(HttpToolsProtocol):
    """One connection, until it turns out to be HTTP/2 or a WebSocket."""

    def __init__(self, server: Http1Server) -> None:
        super().__init__(server.config, server.state, {})
        self._owner = server
        self._begun: bytes | None = b""  # bytes of a connection whose protocol is not known yet
        self._unread = 0  # bytes since the last complete event
        self._head = 0  # bytes of the request line and headers
        self._refusal = _MALFORMED  # the response to an invalid head
        self._drain: _Drain | None = None
        self._answering: RequestResponseCycle | None = None
        self._sender: Sender | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._stop_draining()
        self._unset_keepalive_if_required()
        answers = [cycle for cycle, _ in self.pipeline]
        if self._answering is not None:
            answers.append(self._answering)
        for cycle in answers:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        self.pipeline.clear()
        self._answering = None
        self._shut()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._shut()
        super().pause_writing()

    def _shut(self) -> None:
        """Close the fast path: every piece of a stream is checked again."""
        if self._sender is not None:
            self._sender.is_open = False

    def data_received(self, data: bytes) -> None:
        if self._begun is not None:
            data = self._begun + data
            if len(data) < len(_PREFACE) and _PREFACE.startswith(data):
                self._begun = data
                return
            self._begun = None
            if data.startswith(_PREFACE):
                self._hand_over(data)
                return
        if self.transport.is_closing() or (self._drain is not None and not self._drain.take(data)):
            return
        if self.cycle is None or (self.cycle.response_complete and self._drain is None):
            self._await_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and self.parser is not None:
            self._refuse(_TOO_LARGE)

    def _hand_over(self, data: bytes) -> None:
        self._head_arrived()
        self.connections.discard(self)
        self._owner.hand_over(self.transport, data)

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0

    def on_url(self, url: bytes) -> None:
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._measure(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _measure(self, size: int) -> None:
        self._head += size
        if self._head > HEAD_BYTES:
            self._refusal = _TOO_LARGE
            raise ValueError("the head is too large")

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests before an answer")
        refusal = wrong_host(self.headers, self.parser.get_http_version()) or wrong_coding(self.headers)
        if refusal is not None:
            refusal.headers.update(_CLOSE)
            self._refusal = refusal
            raise ValueError("a head that is not taken")
        self._unread = 0
        self._head_arrived()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        self._head_arrived()
        self._stop_draining()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, problem: Problem) -> None:
        """Send an error response, unless another response has begun; then close."""
        self._head_arrived()
        if self.transport.is_closing():
            return
        if self._answering is not None and not self._answering.response_complete:
            self.transport.abort()
            return
        self.transport.write(_whole(problem, self.server_state.default_headers))
        self._drain_and_close()

    def _leave_unread(self, cycle: RequestResponseCycle) -> None:
        """Read and discard the rest of an answered request; then close if requested.

        Closing while the client sends would reset the connection, and the client might never see the response.
        """
        if cycle.keep_alive:
            self._drain = _Drain(self.transport)  # until the end of the request
        else:
            cycle.keep_alive = True  # only so that uvicorn does not close the connection with the response
            cycle.on_response = self._drain_and_close

    def _drain_and_close(self) -> None:
        """Close our sending side, and the connection when the client has closed its own."""
        self._stop_draining()
        if self.transport.is_closing():
            return
        self._drain = _Drain(self.transport, closing=True)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _stop_draining(self) -> None:
        if self._drain is not None:
            self._drain.stop()
            self._drain = None

    def handle_websocket_upgrade(self) -> None:
        if self._owner.is_busy:
            self._refuse(_BUSY)
            return
        self._head_arrived()
        super().handle_websocket_upgrade()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if not self.parser.should_upgrade():
            self.headers = []  # streams last long: only the application keeps the request's data
        task = self.loop.create_task(self._answer(cycle, _busy if self._owner.is_busy else app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _answer(self, cycle: RequestResponseCycle, app: Any) -> None:
        sender = self._sender = Sender(cycle, self._leave_unread)
        try:
            await app(cycle.scope, cycle.receive, sender)
        except ConnectionError:
            pass  # the client is gone
        except Exception:
            log.exception("request failed", path=cycle.scope.get("path"))
            if not cycle.response_started:
                await send_problem(cycle.send, _FAILED)
        finally:
            sender.is_open = False
            cycle.on_response = _nothing
            if not cycle.response_complete:
                self.transport.abort()  # the client must not take a partial response for the whole
            elif self.transport.is_closing() and self.transport.get_write_buffer_size():
                self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class _Drain:
    """The discarded rest of a request: bounded in bytes and time; beyond them the connection is cut.

    ``closing``: further data is not parsed, not even for its end.
    """

    __slots__ = ("_closing", "_end", "_size", "_transport")

    def __init__(self, transport: asyncio.Transport, *, closing: bool = False) -> None:
        self._transport = transport
        self._closing = closing
        self._size = 0
        self._end = asyncio.get_running_loop().call_later(DRAIN_SECONDS, transport.abort)

    def take(self, data: bytes) -> bool:
        """Count received bytes; return whether to parse them."""
        self._size += len(data)
        if self._size > DRAIN_BYTES:
            self._transport.abort()
            return False
        return not self._closing

    def stop(self) -> None:
        """Cancel the bounds."""
        self._end.cancel()


class _Socket(WebSocketsSansIOProtocol):
    """One WebSocket."""

    def shutdown(self) -> None:
        if self.handshake_complete:
            super().shutdown()
        # Otherwise the application has yet to accept it.

    async def send(self, message: Any) -> None:
        if message["type"] != "websocket.send" or not self.handshake_complete or self.close_sent:
            await super().send(message)
            return
        if not self.writable.is_set():
            await self.writable.wait()
        if self.disconnected or self.transport.is_closing():
            raise ClientDisconnected
        self.transport.write(FRAMES.of(message))

    def handle_ping(self) -> None:
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set():  # a client that does not read gets no more messages
            self.transport.write(pong)

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)  # if the client does not close it


def _nothing() -> None:
    """Do nothing, in place of a callback that is no longer needed."""


def _whole(problem: Problem, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Encode a complete response, after which the connection is closed."""
    body = problem_bytes(problem)
    lines = [f"HTTP/1.1 {problem.status} {problem.details.title}".encode()]
    lines += [name + b": " + value for name, value in [*headers, *problem_headers(problem, body)]]
    return b"\r\n".join([*lines, b"", body])


async def _busy(_scope: Any, _receive: Any, send: Any) -> None:
    await send_problem(send, _BUSY)
