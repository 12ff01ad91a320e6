"""Parse an HTTP/1.1 response with server-sent events, push style and cheap; no I/O."""

__all__ = ["MalformedResponse", "Response", "request"]


class MalformedResponse(ValueError):
    """The bytes are not an HTTP/1.1 response."""


def request(method: str, path: str, host: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", *(f"{k}: {v}" for k, v in headers.items())]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class Response:
    """One response while it arrives. ``status`` and ``headers`` are set once the head is complete.

    Events must end with an empty line and have only LF line ends, as from all servers measured here.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.ended = False
        self.tail = b""
        self._rest = b""
        self._chunked = False
        self._length: int | None = None
        self._left = 0
        self._skip = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Add the data of one read; return the event blocks that it completes. The remainder stays in ``tail``.

        Raises:
            MalformedResponse: the data is not HTTP.
        """
        if self.ended:
            return []  # what is left of the last chunk's end
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self.status is None:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return []
            self._head(data[:end])
            data = data[end + 4 :]
        payload = self._dechunk(data) if self._chunked else self._counted(data)
        blocks = (self.tail + payload).split(b"\n\n")
        self.tail = blocks.pop()
        return blocks

    def _head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        try:
            version, status, *_ = first.split(" ", 2)
            self.status = int(status)
        except ValueError as error:
            raise MalformedResponse(f"not an HTTP response: {first[:80]!r}") from error
        if not version.startswith("HTTP/1."):
            raise MalformedResponse(f"not HTTP/1.1: {first[:80]!r}")
        self.headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if "content-length" in self.headers:
            self._length = int(self.headers["content-length"])
            self.ended = self._length == 0

    def _counted(self, data: bytes) -> bytes:
        if self._length is not None:
            self._length -= len(data)
            self.ended = self._length <= 0
        return data

    def _dechunk(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        position, size = 0, len(data)
        while position < size:
            if self._left:
                part = data[position : position + self._left]
                parts.append(part)
                position += len(part)
                self._left -= len(part)
                self._skip = 0 if self._left else 2
            elif self._skip:
                step = min(self._skip, size - position)
                position += step
                self._skip -= step
            else:
                end = data.find(b"\r\n", position)
                if end < 0:
                    self._rest = data[position:]
                    break
                self._left = self._size(data[position:end])
                position = end + 2
                if not self._left:
                    self.ended = True
                    break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @staticmethod
    def _size(line: bytes) -> int:
        try:
            return int(line.split(b";", 1)[0], 16)
        except ValueError as error:
            raise MalformedResponse(f"not the size of a chunk: {line[:40]!r}") from error
