"""Other relays, measured by the same clients; installed on request into a separate environment."""

import secrets
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

from bench.processes import Processes, fetch, free_port
from bench.targets import Endpoint

__all__ = ["LiteLLM", "PeerNotInstalled"]

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
        if self._program.exists():
            return
        print(f"installing litellm[proxy] into {self._environment} …", file=sys.stderr)
        venv.create(self._environment, with_pip=True)
        pip = [str(self._environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "litellm[proxy]"]
        try:
            subprocess.run(pip, check=True, timeout=INSTALL_SECONDS, capture_output=True, text=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise PeerNotInstalled(
                f"pip install 'litellm[proxy]': {getattr(error, 'stderr', None) or error}"
            ) from error

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
