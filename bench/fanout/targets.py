"""Targets of a fan-out measurement: delivery with a real log, or Nchan. Each starts its processes."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final, Literal, Protocol

import msgspec

from bench.fanout.scenarios import Scenario
from bench.peers import PeerNotInstalled
from bench.processes import Processes, fetch, free_port, python

__all__ = ["BrokerLoad", "Nchan", "Place", "Tailrace", "Target"]

READY_SECONDS: Final = 40.0
NCHAN_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


class Place(msgspec.Struct, frozen=True):
    """Addresses of a target: ``publish_port`` for ``kind``, and by protocol the port and the clients' dialect."""

    kind: Literal["log", "nchan"]
    publish_port: int
    ports: dict[str, int]
    protocols: dict[str, str]


class BrokerLoad(msgspec.Struct, frozen=True):
    """Traffic of delivery's connection to the broker: messages to it (mostly reads), and from it."""

    requests: int
    messages: int
    bytes: int


class Target(Protocol):
    """A system to measure; ``part``: the process whose cost is compared."""

    @property
    def name(self) -> str:
        """Return its name in the report."""
        ...

    @property
    def part(self) -> str:
        """Return the name of the process that serves the subscribers."""
        ...

    def start(self, processes: Processes, scenario: Scenario) -> Place:
        """Start its processes; return their addresses once they are ready."""
        ...

    def load(self) -> BrokerLoad | None:
        """Return the broker's load so far, or ``None`` without a broker."""
        ...

    def counts(self) -> dict[str, float]:
        """Return its own counters."""
        ...


class _Connection(msgspec.Struct):
    name: str = ""
    in_msgs: int = 0
    out_msgs: int = 0
    out_bytes: int = 0


class _Connections(msgspec.Struct):
    connections: list[_Connection]


class Tailrace:
    """A nats-server with file storage, and delivery with its defaults; with ``grpc`` also over gRPC."""

    name: Final = "tailrace"
    part: Final = "delivery"

    def __init__(self, grpc: bool = False) -> None:
        self._grpc = grpc
        self._monitor = self._port = 0

    def start(self, processes: Processes, scenario: Scenario) -> Place:
        """Start the broker and delivery."""
        nats, self._monitor, self._port, calls = (free_port() for _ in range(4))
        beside = Path(sys.executable).with_name("nats-server")
        server = str(beside) if beside.exists() else "nats-server"
        command = [server, "-a", "127.0.0.1", "-p", str(nats), "-m", str(self._monitor)]
        processes.start("nats-server", [*command, "-js", "-sd", str(processes.folder / "nats")])
        health = f"http://127.0.0.1:{self._monitor}/healthz"
        processes.wait(lambda: fetch(health) is not None, READY_SECONDS, "nats-server ready")
        env = {
            "TAILRACE_NATS_URL": f"nats://127.0.0.1:{nats}",
            "TAILRACE_LOG_LEVEL": "warning",
            "TAILRACE_DELIVERY_PORT": str(self._port),
            "TAILRACE_DELIVERY_GRPC_PORT": str(calls if self._grpc else 0),
        }
        if scenario.feed_bytes:
            env["TAILRACE_DELIVERY_FEED_BYTES"] = str(scenario.feed_bytes)
        processes.start("delivery", python("services.delivery"), env)
        ready = f"http://127.0.0.1:{self._port}/readyz"
        processes.wait(lambda: fetch(ready) is not None, READY_SECONDS, "delivery ready")
        ports = {"sse": self._port, "websocket": self._port, "grpc": calls}
        return Place("log", nats, ports, {protocol: protocol for protocol in ports})

    def load(self) -> BrokerLoad | None:
        """Return the broker's statistics of delivery's connection."""
        answer = fetch(f"http://127.0.0.1:{self._monitor}/connz")
        if answer is None:
            return None
        for connection in msgspec.json.decode(answer, type=_Connections).connections:
            if connection.name.endswith("delivery"):
                return BrokerLoad(connection.in_msgs, connection.out_msgs, connection.out_bytes)
        return None

    def counts(self) -> dict[str, float]:
        """Return delivery's counters that have no labels, and the streams closed by reason."""
        text = (fetch(f"http://127.0.0.1:{self._port}/metrics") or b"").decode()
        wanted = r"^tailrace_delivery_(\w+?)_total(?:\{reason=\"(\w+)\"\})? ([0-9.e+]+)$"
        found = re.findall(wanted, text, flags=re.MULTILINE)
        return {f"{name}:{reason}" if reason else name: float(value) for name, reason, value in found}


class Nchan:
    """nginx with one worker and the Nchan module, its channels in memory; posted to over HTTP."""

    name: Final = "nchan"
    part: Final = "nginx"

    def install(self) -> None:
        """Check that nginx with Nchan is installed.

        Raises:
            PeerNotInstalled: it is not.
        """
        if shutil.which("nginx") is None or not NCHAN_MODULE.exists():
            raise PeerNotInstalled(
                "nginx with Nchan is not installed: apt-get install nginx-light libnginx-mod-nchan (Debian, Ubuntu); "
                "the nginx that they start is not needed"
            )

    def start(self, processes: Processes, scenario: Scenario) -> Place:
        """Start nginx in the run's folder."""
        port, folder = free_port(), processes.folder
        config = folder / "nginx.conf"
        config.write_text(
            _NCHAN.format(
                user="user root;" if os.geteuid() == 0 else "",  # the folder is private
                module=NCHAN_MODULE,
                folder=folder,
                port=port,
                kept=max(1_000, scenario.events),
            )
        )
        processes.start("nginx", ["nginx", "-e", "stderr", "-c", str(config)])
        ready = f"http://127.0.0.1:{port}/ready"
        processes.wait(lambda: fetch(ready) is not None, READY_SECONDS, "nginx ready")
        return Place("nchan", port, {"sse": port}, {"sse": "nchan-sse"})

    def load(self) -> BrokerLoad | None:
        """Return ``None``: there is no broker."""
        return None

    def counts(self) -> dict[str, float]:
        """Return no counters."""
        return {}


_NCHAN: Final = """\
daemon off;
{user}
load_module {module};
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 19000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  nchan_shared_memory_size 512m;
  keepalive_requests 1000000000;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /ready {{ return 200; }}
    location = /publish {{
      nchan_publisher;
      nchan_channel_id $arg_id;
      nchan_message_buffer_length {kept};
      nchan_message_timeout 1h;
    }}
    location = /subscribe {{
      nchan_subscriber eventsource;
      nchan_channel_id $arg_id;
    }}
  }}
}}
"""
