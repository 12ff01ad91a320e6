"""Check that each lock file is complete: every requirement of every locked package is met by the lock itself.

An installation with ``pip install --no-deps`` resolves nothing, so a requirement that the lock does not meet would be
missing without an error. The check follows the requirements from ``pyproject.toml`` through the locked packages, extras
included, for each Python and platform of `ENVIRONMENTS`. It never asks an index what is newest: metadata comes from the
installed packages, and for a version that is locked for other Pythons alone, from exactly that version's wheel, whose
hash is checked.

    .venv/bin/python deploy/check_lock.py
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = ["ENVIRONMENTS", "LOCKS", "Locked", "MetadataMissing", "main", "parse_lock", "problems_of"]

REPOSITORY = Path(__file__).parents[1]
LOCKS = {"requirements.lock": "standalone", "requirements-dev.lock": "dev"}
"""Each lock file, and the extra of ``pyproject.toml`` that it is made from."""

_PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux"},
    "macOS": {"sys_platform": "darwin", "platform_system": "Darwin"},
}
_MACHINES = {"linux": ("x86_64", "aarch64"), "macOS": ("x86_64", "arm64")}


def _environments() -> Iterator[tuple[str, dict[str, str]]]:
    for minor, platform in itertools.product((11, 12, 13, 14), _PLATFORMS):
        for machine in _MACHINES[platform]:
            environment = {
                "implementation_name": "cpython",
                "platform_python_implementation": "CPython",
                "os_name": "posix",
                "python_version": f"3.{minor}",
                "python_full_version": f"3.{minor}.9",
                "implementation_version": f"3.{minor}.9",
                "platform_machine": machine,
                **_PLATFORMS[platform],
            }
            yield f"Python 3.{minor} on {platform} {machine}", environment


ENVIRONMENTS = dict(_environments())
"""The values of markers that the lock must serve, by the name of the environment."""

Metadata = Callable[["Locked"], tuple[list[Requirement], frozenset[str]]]


class MetadataMissing(Exception):
    """The requirements of a locked package cannot be found out."""


@dataclass(frozen=True)
class Locked:
    """One line of a lock file: a package at one version, where its ``marker`` holds."""

    name: str
    version: Version
    marker: Marker | None
    hashes: tuple[str, ...] = ()

    def applies(self, environment: dict[str, str]) -> bool:
        """Tell whether this line is installed in ``environment``."""
        return self.marker is None or self.marker.evaluate(environment)


def parse_lock(text: str) -> list[Locked]:
    """Return the packages of a lock file as ``pip`` reads it.

    Raises:
        ValueError: a line names no exact version, carries no hash, or names an address.
    """
    locked = []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin, *hashes = re.split(r"\s--hash=", line)
        if "://" in line or pin.startswith("-"):
            raise ValueError(f"a lock file names packages and hashes alone, and not: {line[:80]}")
        requirement = Requirement(pin.strip())
        version = re.fullmatch(r"==([^*,]+)", str(requirement.specifier))
        if version is None or not hashes:
            raise ValueError(f"{requirement.name} needs an exact version and a hash")
        marker = requirement.marker
        digests = tuple(each.strip() for each in hashes)
        locked.append(Locked(canonicalize_name(requirement.name), Version(version[1]), marker, digests))
    return locked


def problems_of(
    roots: Iterable[Requirement], locked: list[Locked], metadata_of: Metadata, environment: dict[str, str]
) -> list[str]:
    """Return what the lock lacks in one environment: one line for each requirement that it does not meet.

    ``roots``: the requirements of the project itself. ``metadata_of`` gives the requirements and the extras of a locked
    package, and raises `MetadataMissing`.
    """
    problems: list[str] = []
    here: dict[str, Locked] = {}
    for line in locked:
        if line.applies(environment):
            if line.name in here:
                problems.append(f"{line.name} is locked twice: {here[line.name].version} and {line.version}")
            here[line.name] = line
    seen: set[tuple[str, str]] = set()
    waiting = [("the project", root, "") for root in roots]
    while waiting:
        origin, requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        found = here.get(canonicalize_name(requirement.name))
        if found is None:
            problems.append(f"{origin} requires {requirement}, which is not locked")
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            problems.append(f"{origin} requires {requirement}, and {found.version} is locked")
        wanted = {("", True), *((canonicalize_name(each), False) for each in requirement.extras)}
        for name, is_plain in wanted:
            if (found.name, name) in seen:
                continue
            seen.add((found.name, name))
            requires, extras = metadata_of(found)
            if not is_plain and name not in extras:
                problems.append(f"{origin} requires {requirement}, and {found.name} {found.version} has no such extra")
                continue
            origin_of = f"{found.name}[{name}]" if name else found.name
            waiting.extend((origin_of, each, name) for each in requires)
    return sorted(set(problems))


def roots_of(pyproject: str, extra: str) -> list[Requirement]:
    """Return the requirements of the project with ``extra``, its references to itself resolved, and of its build."""
    document = tomllib.loads(pyproject)
    project = document["project"]
    roots = [Requirement(each) for each in [*project["dependencies"], *document["build-system"]["requires"]]]
    waiting, seen = [extra], {extra}
    while waiting:
        for each in project["optional-dependencies"][waiting.pop()]:
            requirement = Requirement(each)
            if canonicalize_name(requirement.name) == project["name"]:
                waiting.extend(requirement.extras - seen)
                seen |= requirement.extras
            else:
                roots.append(requirement)
    return roots


class PackageMetadata:
    """Reads requirements from installed packages, else from the locked version's wheel."""

    def __init__(self, hashes: dict[tuple[str, Version], set[str]]) -> None:
        self._hashes = hashes
        self._known: dict[tuple[str, Version], tuple[list[Requirement], frozenset[str]]] = {}

    def __call__(self, locked: Locked) -> tuple[list[Requirement], frozenset[str]]:
        """Return the requirements and extras of ``locked``.

        Raises:
            MetadataMissing: it is not installed and its wheel could not be had.
        """
        key = (locked.name, locked.version)
        if key not in self._known:
            self._known[key] = self._installed(locked) or self._from_wheel(locked)
        return self._known[key]

    def _installed(self, locked: Locked) -> tuple[list[Requirement], frozenset[str]] | None:
        try:
            found = metadata.distribution(locked.name)
        except metadata.PackageNotFoundError:
            return None
        if Version(found.version) != locked.version:
            return None
        return _parsed(found.requires or [], found.metadata.get_all("Provides-Extra") or [])

    def _from_wheel(self, locked: Locked) -> tuple[list[Requirement], frozenset[str]]:
        pin = f"{locked.name}=={locked.version}"
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "requirements.txt"
            digests = sorted(self._hashes[locked.name, locked.version])
            lines.write_text(" ".join([pin, *(f"--hash={digest}" for digest in digests)]) + "\n")
            options = ["--quiet", "--no-deps", "--require-hashes", "--ignore-requires-python", "--dest", folder]
            fetched = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, "--requirement", str(lines)],
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            )
            wheels = list(Path(folder).glob("*.whl"))
            if fetched.returncode or not wheels:
                raise MetadataMissing(
                    f"{pin} is not installed here and its wheel cannot be had: {fetched.stderr[-500:]}"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                name = next(each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
                headers = HeaderParser().parsestr(wheel.read(name).decode())
        return _parsed(headers.get_all("Requires-Dist") or [], headers.get_all("Provides-Extra") or [])


def _parsed(requires: list[str], extras: list[str]) -> tuple[list[Requirement], frozenset[str]]:
    return [Requirement(each) for each in requires], frozenset(canonicalize_name(each) for each in extras)


def main() -> int:
    """Print what each lock file lacks; return the exit status."""
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    found: list[str] = []
    for file, extra in LOCKS.items():
        try:
            found += [f"{file}, {problem}" for problem in _check(pyproject, extra, (REPOSITORY / file).read_text())]
        except (MetadataMissing, ValueError) as error:
            found.append(f"{file}: {error}")
    summary = f"{' and '.join(LOCKS)} meet every requirement in {len(ENVIRONMENTS)} environments"
    sys.stdout.write("\n".join([*(found or [summary]), ""]))
    return int(bool(found))


def _check(pyproject: str, extra: str, lock: str) -> Iterator[str]:
    locked = parse_lock(lock)
    hashes: dict[tuple[str, Version], set[str]] = {}
    for line in locked:
        hashes.setdefault((line.name, line.version), set()).update(line.hashes)
    metadata_of = PackageMetadata(hashes)
    for name, environment in ENVIRONMENTS.items():
        for problem in problems_of(roots_of(pyproject, extra), locked, metadata_of, environment):
            yield f"{name}: {problem}"


if __name__ == "__main__":
    sys.exit(main())
