"""The architecture as it is meant to be: imports run downwards, and parts fit a screen."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megaprompt"
LAYERS = (
    ("errors",),
    ("files",),
    ("console",),
    ("seeds",),
    ("config",),
    ("prompting",),
    ("distributed",),
    ("backbone",),
    ("tasks",),
    ("engine",),
    ("methods",),
    ("resources", "report"),
    ("run",),
    ("cli", "callback"),
    ("__init__", "__main__"),
)
"""From the bottom to the top. Parts of one layer do not know each other."""
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
LONGEST = {"file": 300, "function": 60, "class": 150}

UPWARD: dict[tuple[str, str], str] = {}
"""Imports that run upwards all the same: (file, imported part) -> the reason."""
LONG: dict[str, str] = {}
"""Parts that are longer all the same: file, or file:name -> the reason."""

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_parts(path: Path) -> set[str]:
    """The parts of megaprompt that a file imports anywhere: at its top, in functions, or for types only."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "megaprompt" and (part := rest.partition(".")[0]) in LEVEL:
                parts.add(part)
    return parts


def violations(path: Path) -> list[tuple[str, str]]:
    own = name_of(path).partition("/")[0].removesuffix(".py")
    return [(name_of(path), part) for part in sorted(imported_parts(path)) if part != own and LEVEL[part] >= LEVEL[own]]


def lengths(path: Path) -> dict[str, tuple[str, int]]:
    """Kind and lines of a file, and of every function and class in it."""
    text = path.read_text(encoding="utf-8")
    found = {name_of(path): ("file", len(text.splitlines()))}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            assert node.end_lineno is not None
            name, size = f"{name_of(path)}:{node.name}", node.end_lineno - node.lineno + 1
            found[name] = max(found.get(name, (kind, 0)), (kind, size))  # several may have one name
    return found


def test_every_part_has_a_layer():
    parts = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    assert parts - {"__pycache__", "py.typed"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path):
    assert [one for one in violations(path) if one not in UPWARD] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_parts_fit_a_screen(path):
    too_long = {name: size for name, (kind, size) in lengths(path).items() if size > LONGEST[kind]}
    assert {name: size for name, size in too_long.items() if name not in LONG} == {}


def test_no_exception_is_out_of_date():
    assert set(UPWARD) <= {one for path in FILES for one in violations(path)}
    assert set(LONG) <= {name for path in FILES for name, (kind, size) in lengths(path).items() if size > LONGEST[kind]}


def test_what_the_rules_see(tmp_path, monkeypatch):
    """Imports in functions, for types, and of whole modules count; so do methods and nested functions."""
    path = tmp_path / "engine" / "loop.py"
    path.parent.mkdir()
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path.write_text(
        "import megaprompt.cli\nfrom typing import TYPE_CHECKING\nfrom megaprompt import run\n"
        "if TYPE_CHECKING:\n    from megaprompt.report.html import x\n"
        "class A:\n    def f(self):\n        from megaprompt.methods import best\n"
        "        from megaprompt.tasks.task import Task\n" + "        pass\n" * 60
    )
    assert {part for _, part in violations(path)} == {"cli", "run", "report", "methods"}
    assert lengths(path)["engine/loop.py:f"] == ("function", 63)
    assert lengths(path)["engine/loop.py:A"] == ("class", 64)
