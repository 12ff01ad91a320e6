"""Test private files and folders under the widest umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.billing.adapters.database import migrate, open_engine
from services.billing.database_url import sqlite_url
from services.kit.private_files import private_file, private_folder, tighten


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_new_files_and_folders_are_private(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "folder") is None
    assert private_file(tmp_path / "folder" / "file") is None
    assert (mode(tmp_path / "folder"), mode(tmp_path / "folder" / "file")) == (0o700, 0o600)


def test_wider_modes_are_tightened_and_contents_stay(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir(mode=0o755)
    file.write_text("kept")
    file.chmod(0o664)
    assert (private_folder(folder), private_file(file)) == (None, None)
    assert (mode(folder), mode(file), file.read_text()) == (0o700, 0o600, "kept")


def test_missing_files_and_symbolic_links_are_not_changed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(0o644)
    (tmp_path / "link").symlink_to(elsewhere)
    assert (tighten(tmp_path / "link"), tighten(tmp_path / "missing")) == (None, None)
    assert mode(elsewhere) == 0o644


def test_a_mode_that_cannot_be_changed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "file").touch(0o644)
    monkeypatch.setattr(Path, "chmod", refuse)
    warning = tighten(tmp_path / "file")
    assert warning is not None
    assert str(tmp_path / "file") in warning


async def test_a_database_and_its_journal_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with open_engine(sqlite_url(f"{folder}/billing.db")) as engine:
        await migrate(engine)
        names = {path.name: mode(path) for path in folder.iterdir()}
        assert names == dict.fromkeys(("billing.db", "billing.db-wal", "billing.db-shm"), 0o600)
        assert mode(folder) == 0o700


async def test_a_folder_that_was_there_before_a_database_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    async with open_engine(sqlite_url(f"{tmp_path}/billing.db")):
        assert mode(tmp_path) == 0o755
        assert mode(tmp_path / "billing.db") == 0o600
