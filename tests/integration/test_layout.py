"""The layout of the package and of its tests: what no linter checks."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports(path: Path) -> set[str]:
    """First parts of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_no_test_module_imports_another() -> None:
    tests = list((ROOT / "tests").rglob("*.py"))
    assert len(tests) > 60
    for path in tests:
        wrong = [name for name in imports(path) if name == "conftest" or name.startswith("test_")]
        assert not wrong, f"{path} imports {wrong}"


def test_tests_mirror_the_packages() -> None:
    packages = {p.parent.name for p in (ROOT / "dq").glob("*/__init__.py")}
    folders = {p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py"))}
    assert folders == packages | {"integration", "robustness", "fake_cuda"}


def test_files_are_of_one_idea() -> None:
    assert {p.name for p in (ROOT / "dq").iterdir() if p.is_file()} == {"__init__.py", "__init__.pyi", "py.typed"}
    long = {str(p): n for p in (ROOT / "dq").rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long
