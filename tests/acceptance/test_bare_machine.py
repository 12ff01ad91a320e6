"""Test the README's two commands on a Debian machine with Python, venv and make alone.

An empty root (Debian's essential packages and apt) is made by mmdebstrap and entered with namespaces of its own, as an
ordinary user. The network and the
settings of pip are those of this machine.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.processes import free_port
from tests.conftest import require
from tests.support.service_processes import REPOSITORY

pytestmark = [pytest.mark.acceptance, pytest.mark.bare, pytest.mark.timeout(1800)]

PACKAGES = "python3,python3-venv,make"
USER = "1000:1000"
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
SOURCES = [Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")]
PIP_FILES = [Path("/etc/pip.conf"), *Path("/etc/xdg/pip").glob("*")]
UP = """
python3 - <<'PYTHON'
import os, signal, subprocess, time, urllib.request
page = f"http://127.0.0.1:{os.environ['PORT']}"
with open("up.log", "wb") as log:
    up = subprocess.Popen(["make", "up"], stdout=log, stderr=log, start_new_session=True)
deadline = time.monotonic() + 900
while True:
    try:
        urllib.request.urlopen(f"{page}/readyz", timeout=2).close()
        break
    except OSError:
        assert up.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
assert b"<title>" in urllib.request.urlopen(page, timeout=5).read()
ask = ["ask", "--url", page, "--session", "bare", "What is a tailrace?"]
subprocess.run([".venv/bin/tailrace", *ask], check=True, stdout=subprocess.DEVNULL)
os.killpg(up.pid, signal.SIGINT)
print("make up ended with", up.wait(60))
PYTHON
"""


class BareRoot:
    """A root folder with a checkout of this repository in an ordinary user's home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        sources = next(path for path in SOURCES if path.exists())
        suite = subprocess.run(
            ["sh", "-c", '. /etc/os-release && echo "$VERSION_CODENAME"'], check=True, capture_output=True, text=True
        ).stdout.strip()
        argv = ["mmdebstrap", "--quiet", "--variant=apt", "--mode=root", f"--include={PACKAGES}"]
        subprocess.run([*argv, suite, str(self.folder), str(sources)], check=True, timeout=600)
        with (self.folder / "etc/passwd").open("a") as users:
            users.write("someone:x:1000:1000::/home/someone:/bin/sh\n")
        for path in (BUNDLE, *PIP_FILES):
            if path.exists():
                (self.folder / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.folder / path.relative_to("/"))
        self._check_out()

    def _check_out(self) -> None:
        """Copy the files that git tracks, with uncommitted changes."""
        home = self.folder / "home/someone/tailrace"
        home.mkdir(parents=True)
        names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True).stdout
        for name in names.decode().split("\0"):
            source = REPOSITORY / name
            if name and source.is_file():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, home / name)
        subprocess.run(["chown", "-R", USER, str(self.folder / "home/someone")], check=True)

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the checkout; processes it leaves behind end with it."""
        settings = {
            name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "SSL_CERT_FILE"
        }
        env = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/home/someone",
            "LANG": "C.UTF-8",
            **settings,
            **variables,
        }
        enter = (
            'mount --rbind /dev "$0/dev" && mount -t tmpfs -o mode=1777 tmpfs "$0/tmp" '
            f'&& exec chroot --userspec={USER} "$0" sh -c "$1"'
        )
        within = 'PATH=/usr/local/bin:/usr/bin:/bin; cd /home/someone/tailrace && eval "$SCRIPT"'
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.folder}/proc"]
        process = subprocess.Popen(
            [*argv, "sh", "-c", enter, str(self.folder), within],
            env=env | {"SCRIPT": script},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=1500)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate(timeout=30)
        return subprocess.CompletedProcess(argv, process.returncode, output, "")

    def read(self, name: str) -> str:
        path = self.folder / "home/someone/tailrace" / name
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareRoot]:
    require(os.geteuid() == 0, "making a root folder needs root")
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    require(any(path.exists() for path in SOURCES), "this is no Debian machine")
    root = BareRoot(tmp_path_factory.mktemp("bare") / "root")
    try:
        root.make()
        yield root
    finally:
        shutil.rmtree(root.folder, ignore_errors=True)


def test_make_up_runs_everything_and_stops_on_ctrl_c(bare: BareRoot) -> None:
    services = ("DELIVERY_GRPC", "BILLING", "PRODUCER", "NATS")
    ports = {f"TAILRACE_{service}_PORT": str(free_port()) for service in services}
    port = str(free_port())
    done = bare.run(UP, PORT=port, ARGS=f"--port {port}", **ports)
    seen = f"{done.stdout[-3000:]}\n{bare.read('up.log')[-3000:]}"
    assert done.returncode == 0, seen
    assert "make up ended with" in done.stdout, seen  # 0, or by the signal that make got as well
    assert "stopped" in bare.read("up.log"), seen


def test_make_test_passes(bare: BareRoot) -> None:
    done = bare.run(f"make test ARGS='-q {os.environ.get('BARE_TESTS', 'tests/unit tests/contracts')}'")
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
