"""TLS from files: for the connection to the broker and for our own ports."""

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["ServerTls", "TlsUnusable", "client_tls", "server_tls"]


class TlsUnusable(ValueError):
    """A certificate or key cannot be read, or one is given without the other."""


def client_tls(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return the TLS context of a client; ``None`` when no file is named.

    ``ca``: certificates to trust instead of the system's. ``cert`` and ``key``: the client's own, for servers that ask.

    Raises:
        TlsUnusable: a file cannot be used; the text names the setting.
    """
    if ca is None and cert is None and key is None:
        return None
    if (cert is None) != (key is None):
        missing, present = ("NATS_KEY", "NATS_CERT") if key is None else ("NATS_CERT", "NATS_KEY")
        raise TlsUnusable(f"TAILRACE_{missing}: must be set, because TAILRACE_{present} is")
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsUnusable(f"TAILRACE_NATS_CA: cannot use {ca}: {error}") from error
    if cert is not None:
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise TlsUnusable(f"TAILRACE_NATS_CERT, TAILRACE_NATS_KEY: cannot use {cert} and {key}: {error}") from error
    return context


class ServerTls(NamedTuple):
    """The certificate (with its chain) and key of a server, as files."""

    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """Return the content of the certificate and key files."""
        return self.certificate.read_bytes(), self.key.read_bytes()

    def context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """Return the TLS context of a server of ``protocols`` (ALPN, most preferred first); TLS 1.2 at least."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        context.set_alpn_protocols(list(protocols))
        return context


def server_tls(cert: str | None, key: str | None, prefix: str = "TAILRACE_") -> ServerTls | None:
    """Return a server's certificate and key files, checked once at start; ``None`` when no file is named.

    ``prefix``: of the service's variables.

    Raises:
        TlsUnusable: one is missing, or they cannot be used.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing, present = ("TLS_KEY", "TLS_CERT") if key is None else ("TLS_CERT", "TLS_KEY")
        raise TlsUnusable(f"{prefix}{missing}: must be set, because {prefix}{present} is")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise TlsUnusable(f"{prefix}TLS_CERT, {prefix}TLS_KEY: cannot use {cert} and {key}: {error}") from error
    return ServerTls(Path(cert).resolve(), Path(key).resolve())
