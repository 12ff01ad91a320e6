"""Test that the lock files are complete and that the check finds every kind of incompleteness."""

import pytest
from packaging.requirements import Requirement

from deploy.check_lock import ENVIRONMENTS, Locked, MetadataMissing, main, parse_lock, problems_of, roots_of

LINUX_311 = ENVIRONMENTS["Python 3.11 on linux x86_64"]
LINUX_314 = ENVIRONMENTS["Python 3.14 on linux x86_64"]
MACOS_311 = ENVIRONMENTS["Python 3.11 on macOS arm64"]
PACKAGES = {
    "app": (["library[fast]>=2", "old; python_version < '3.12'", "mac; sys_platform == 'darwin'"], []),
    "library": (["engine<5; extra == 'fast'", "absent; extra == 'never'"], ["fast", "never"]),
    "engine": ([], []),
    "old": ([], []),
    "mac": ([], []),
}
LOCK = """
app==1.0 \\
    --hash=sha256:aa
library==2.1 --hash=sha256:bb
engine==4.0 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
old==1 ; python_full_version < '3.12' --hash=sha256:ee
mac==1 ; sys_platform == 'darwin' --hash=sha256:ff
"""


def metadata_of(locked: Locked) -> tuple[list[Requirement], frozenset[str]]:
    requires, extras = PACKAGES[locked.name]
    return [Requirement(each) for each in requires], frozenset(extras)


def check(lock: str, environment: dict[str, str] = LINUX_311) -> list[str]:
    return problems_of([Requirement("app")], parse_lock(lock), metadata_of, environment)


def without(lock: str, name: str) -> str:
    lines = lock.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if not line.startswith(f"{name}=="))


def test_the_lock_files_of_the_project_meet_every_requirement(capsys: pytest.CaptureFixture[str]) -> None:
    status = main()
    output = capsys.readouterr().out
    assert status == 0, output
    assert "16 environments" in output


@pytest.mark.parametrize("environment", [LINUX_311, LINUX_314, MACOS_311])
def test_a_complete_lock_has_no_problems(environment: dict[str, str]) -> None:
    assert check(LOCK, environment) == []


def test_a_requirement_of_an_extra_that_is_not_locked_is_found() -> None:
    assert check(without(LOCK, "engine")) == ['library[fast] requires engine<5; extra == "fast", which is not locked']


def test_a_version_outside_of_the_range_of_an_extra_is_found() -> None:
    assert check(LOCK.replace("engine==4.0", "engine==5.0")) == [
        'library[fast] requires engine<5; extra == "fast", and 5.0 is locked'
    ]


def test_a_version_outside_of_the_range_of_a_package_is_found() -> None:
    assert check(LOCK.replace("library==2.1", "library==1.9")) == ["app requires library[fast]>=2, and 1.9 is locked"]


def test_an_extra_that_the_locked_version_does_not_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "library", ([], []))
    assert check(LOCK) == ["app requires library[fast]>=2, and library 2.1 has no such extra"]


def test_a_package_that_is_missing_on_one_platform_alone_is_found() -> None:
    lock = without(LOCK, "mac")
    assert check(lock, LINUX_311) == []
    assert check(lock, MACOS_311) == ['app requires mac; sys_platform == "darwin", which is not locked']


def test_a_package_that_is_missing_on_one_python_alone_is_found() -> None:
    lock = without(LOCK, "old")
    assert check(lock, LINUX_314) == []
    assert check(lock, LINUX_311) == ['app requires old; python_version < "3.12", which is not locked']


def test_two_versions_for_one_environment_are_found() -> None:
    assert check(LOCK + "old==2 --hash=sha256:ab\n") == ["old is locked twice: 1 and 2"]


@pytest.mark.parametrize(
    "line",
    [
        "app>=1 --hash=sha256:aa",
        "app==1.* --hash=sha256:aa",
        "app==1",
        "app @ file:///tmp/app.whl --hash=sha256:aa",
        "--index-url file:///tmp/simple",
    ],
)
def test_a_line_that_is_no_hashed_pin_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"lock file|exact version"):
        parse_lock(line)


def test_a_package_without_metadata_is_an_error() -> None:
    def unknown(locked: Locked) -> tuple[list[Requirement], frozenset[str]]:
        raise MetadataMissing(locked.name)

    with pytest.raises(MetadataMissing):
        problems_of([Requirement("app")], parse_lock(LOCK), unknown, LINUX_311)


def test_the_project_refers_to_its_own_extras() -> None:
    pyproject = """
    [build-system]
    requires = ["hatchling"]
    [project]
    name = "thing"
    dependencies = ["one"]
    [project.optional-dependencies]
    small = ["two"]
    dev = ["thing[small]", "three"]
    """
    assert {each.name for each in roots_of(pyproject, "dev")} == {"hatchling", "one", "two", "three"}
