"""Check the head of a request before its body is read: its host, transfer coding and body size."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from services.kit.problem import Problem

__all__ = ["BodyLimit", "refused_body", "wrong_coding", "wrong_host"]

_HTTP_1_0: Final = "1.0"
_HTTP_1_1: Final = "1.1"


class BodyLimit(NamedTuple):
    """The maximum size of a body in bytes, and the setting that changes it."""

    size: int
    setting: str

    def exceeded(self, size: int | None = None) -> Problem:
        """Return the problem of a body of ``size`` bytes; ``None``: its size is unknown."""
        found = "more than" if size is None else f"{size} bytes, and at most"
        detail = f"the body has {found} {self.size} bytes" + ("" if size is None else " are taken")
        return Problem(413, f"{detail}: {self.setting} sets the limit")


def wrong_host(headers: Iterable[tuple[bytes, bytes]], version: str) -> Problem | None:
    """Return the problem of a request that does not name one host, or None; ``version``: its version of HTTP.

    RFC 9112, 3.2: a missing or repeated ``Host`` is ambiguous. An empty one is allowed in HTTP/1.1; in HTTP/2 it
    represents a missing ``:authority``.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        return Problem(400, f"a request names one host, and this one has {len(hosts)} Host headers")
    if version == _HTTP_1_0 or (hosts and (hosts[0] or version == _HTTP_1_1)):
        return None
    missing = "Host header" if version == _HTTP_1_1 else ":authority"
    return Problem(400, f"a request names its host, and this one has no {missing}")


def wrong_coding(headers: Iterable[tuple[bytes, bytes]]) -> Problem | None:
    """Return the problem of an HTTP/1 request whose transfer coding is not ``chunked``, or None.

    RFC 9112, 6.1 and 6.3: the end of its body is uncertain.
    """
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if not codings or codings == [b"chunked"]:
        return None
    shown = b", ".join(codings)[:40].decode("latin-1")
    return Problem(501, f"Transfer-Encoding {shown!r} is not understood: send chunked, or a Content-Length")


def refused_body(scope: Any, limit: BodyLimit) -> Problem | None:
    """Return the problem of a body announced as too large or as encoded; ``None`` when it may be read."""
    announced, encodings = 0, []
    for name, value in scope["headers"]:
        if name == b"content-length":
            announced = int(value) if value.isdigit() else limit.size + 1
        elif name == b"content-encoding":
            encodings += [part.strip().lower() for part in value.decode("latin-1").split(",")]
    if announced > limit.size:
        return limit.exceeded(announced)
    unknown = [encoding for encoding in encodings if encoding not in ("", "identity")]
    if unknown:
        return Problem(
            415,
            f"Content-Encoding {unknown[0][:40]!r} is not understood: send the body as it is",
            headers={"Accept-Encoding": "identity"},  # RFC 9110, 12.5.3: the accepted codings of a request's body
        )
    return None
