"""Test that public class names are unique within a service."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "services"
SERVICES = ["producer", "delivery", "billing"]


def public_classes(service: str) -> dict[str, list[str]]:
    """Return the modules that define each public class of a service at their top level."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / service).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_no_public_class_name_is_used_twice_in_a_service(service: str) -> None:
    classes = public_classes(service)
    assert len(classes) > 20
    assert {name: modules for name, modules in classes.items() if len(modules) > 1} == {}
