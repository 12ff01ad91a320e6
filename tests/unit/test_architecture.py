"""Test that the paths and objects named in docs/architecture.md exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `([^`]+)` \| `([^`]+)` \|$", PAGE, re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Return the names that a module defines: functions, classes, constants, and methods as ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
                names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def test_the_table_has_its_rows() -> None:
    assert len(ROWS) >= 40


@pytest.mark.parametrize(("what", "path", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_every_file_and_object_of_the_table_exists(what: str, path: str, name: str) -> None:
    assert name in defined(ROOT / path), what


def test_paths_in_the_page_exist() -> None:
    for path in re.findall(r"`((?:schemas|services|bench|deploy|tests)/[\w./]*)`", PAGE):
        assert (ROOT / path).exists(), path
