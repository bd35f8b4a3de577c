"""Tests import no other tests: the code that several of them share is in tests/helpers."""

import ast

from paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = {path.stem for path in FILES if path.name.startswith(("test_", "conftest"))}


def imported(path):
    """Yields the components of all names that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names:
                yield from name.name.split(".")


def test_no_test_is_imported():
    importing = {str(path.relative_to(ROOT)): TESTS & set(imported(path)) for path in FILES}
    assert len(TESTS) > 50 and not {path: names for path, names in importing.items() if names}
