"""Other relays, measured by the same clients; installed on request into a separate environment."""

import secrets
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.processes import Processes, fetch, free_port
from bench.relay.targets import Endpoint

__all__ = ["PEERS", "LiteLLM", "Nginx", "PeerNotInstalled", "Smg", "is_peer"]

INSTALL_SECONDS: Final = 600.0
READY_SECONDS: Final = 120.0


class PeerNotInstalled(Exception):
    """The peer could not be installed."""


class LiteLLM:
    """LiteLLM's proxy with one worker, without database, callbacks or retries."""

    name: Final = "litellm"
    parts: Final[tuple[str, ...]] = ("litellm",)

    def __init__(self, environment: Path) -> None:
        self._environment = environment

    @property
    def _program(self) -> Path:
        return self._environment / "bin" / "litellm"

    def install(self) -> None:
        """Install it, unless it is installed already.

        Raises:
            PeerNotInstalled: pip failed or took too long.
        """
        _install(self._environment, "litellm[proxy]", "litellm")

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start the proxy in front of the provider."""
        port = free_port()
        config = processes.folder / "litellm.yaml"
        config.write_text(
            "model_list:\n  - model_name: bench\n    litellm_params:\n      model: openai/bench\n"
            f"      api_base: http://127.0.0.1:{provider}/v1\n      api_key: none\n"
            "litellm_settings:\n  num_retries: 0\n  request_timeout: 600\n"
        )
        command = [
            str(self._program),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
        ]
        key = f"sk-{secrets.token_hex(16)}"  # required at start
        env = {
            "LITELLM_MASTER_KEY": key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOG": "ERROR",
        }
        processes.start("litellm", command, env)
        url = f"http://127.0.0.1:{port}/health/liveliness"
        processes.wait(lambda: fetch(url) is not None, READY_SECONDS, "litellm ready", poll=0.2)
        return Endpoint("openai", port, "bench", {"authorization": f"Bearer {key}"})

    def settled(self) -> bool | None:
        """Return ``None``: no work remains after the clients' end."""
        return None


class Smg:
    """The Rust gateway ``smg`` (PyPI) in front of the provider, with its defaults: no log, no bill."""

    name: Final = "smg"
    parts: Final[tuple[str, ...]] = ("smg",)

    def __init__(self, environment: Path) -> None:
        self._environment = environment

    def install(self) -> None:
        """Install it, unless that was done before.

        Raises:
            PeerNotInstalled: pip failed or took too long.
        """
        _install(self._environment, "smg", "smg")

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start the gateway in front of the provider."""
        port, metrics = free_port(), free_port()
        command = [
            str(self._environment / "bin" / "smg"),
            "launch",
            "--backend",
            "openai",
            "--worker-urls",
            f"http://127.0.0.1:{provider}",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--prometheus-port",
            str(metrics),
        ]
        processes.start("smg", command, {"OPENAI_API_KEY": "none"})
        url = f"http://127.0.0.1:{port}/health"
        processes.wait(lambda: fetch(url) is not None, READY_SECONDS, "smg ready", poll=0.2)
        return Endpoint("openai", port, "bench", {"authorization": "Bearer none"})

    def settled(self) -> bool | None:
        """There is nothing behind the clients."""
        return None


class Nginx:
    """nginx as a plain unbuffered proxy: the limit of what any relay could reach, without log, count or bill."""

    name: Final = "nginx"
    parts: Final[tuple[str, ...]] = ("nginx",)

    def __init__(self, _environment: Path) -> None:
        """Take no environment: nginx is a package of the system."""

    def install(self) -> None:
        """Find the program.

        Raises:
            PeerNotInstalled: there is none.
        """
        if _nginx() is None:
            raise PeerNotInstalled("there is no nginx: install the package nginx-light")

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start nginx in front of the provider."""
        port, folder = free_port(), processes.folder
        config = folder / "nginx.conf"
        config.write_text(
            f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream provider {{ server 127.0.0.1:{provider}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://provider; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
        )
        processes.start("nginx", [_nginx() or "nginx", "-c", str(config), "-e", str(folder / "nginx-error.log")])
        url = f"http://127.0.0.1:{port}/control"
        processes.wait(lambda: fetch(url) is not None, READY_SECONDS, "nginx ready", poll=0.1)
        return Endpoint("openai", port, "bench")

    def settled(self) -> bool | None:
        """There is nothing behind the clients."""
        return None


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _install(environment: Path, package: str, program: str) -> None:
    if (environment / "bin" / program).exists():
        return
    print(f"installing {package} into {environment} …", file=sys.stderr)
    venv.create(environment, with_pip=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
    try:
        subprocess.run(pip, check=True, timeout=INSTALL_SECONDS, capture_output=True, text=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise PeerNotInstalled(f"pip install {package!r}: {getattr(error, 'stderr', None) or error}") from error


PEERS: Final[dict[str, Callable[[Path], LiteLLM | Smg | Nginx]]] = {"litellm": LiteLLM, "smg": Smg, "nginx": Nginx}
"""The peers by name; each is made with the folder of its environment."""


def is_peer(target: object) -> bool:
    """Return whether a target is another relay, whose failures end no run."""
    return isinstance(target, LiteLLM | Smg | Nginx)
