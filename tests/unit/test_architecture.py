"""The import rules of docs/design.md, section 2, and the limits on size, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "blocksnap"
MODULES = sorted(PACKAGE.rglob("*.py"))

TOWERS = {
    "backends": {"backends", "errors"},
    "repository": {"repository", "backends", "errors"},
    "system": {"system", "errors", "_native"},
    "extents": {"extents", "system", "errors", "_native"},
    "volumes": {"volumes", "extents", "system", "errors"},
    "quiesce": {"quiesce", "system", "errors"},
    "controller": {"controller", "quiesce", "volumes", "extents", "system", "quantities", "errors"},
    "pipeline": {"pipeline", "errors"},
    "restore": {"restore", "pipeline", "repository", "backends", "system", "errors"},
    "operations": None,
    "cli": None,
}
ONLY_IN = {
    "sh": {"system/command.py"},
    "pyudev": {"system/udev.py"},
    "subprocess": {"system/command.py"},
    "click": {"cli"},
    "rich": {"cli"},
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def imports(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "blocksnap":
                yield from (f"blocksnap.{alias.name}" for alias in node.names)


def inside(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "blocksnap" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_follow_the_towers(path: Path) -> None:
    tower = relative(path).split("/")[0]
    allowed = TOWERS.get(tower)
    if allowed is None:
        return
    for name in imports(path):
        target = inside(name)
        assert target is None or target in allowed, f"{tower} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_libraries_have_one_importer(path: Path) -> None:
    for name in imports(path):
        places = ONLY_IN.get(name.split(".")[0])
        if places is not None:
            here = relative(path)
            assert here in places or here.split("/")[0] in places, f"{name} belongs to {places}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if relative(path).startswith("cli/"):
        return
    for node in nodes(path):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "os._exit" and relative(path) == "system/children.py":
                continue
            assert called not in {"print", "sys.exit", "exit", "quit", "os._exit"}, (
                f"line {node.lineno}: {called}"
            )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_pattern_ends_by_what_vanishes(path: Path) -> None:
    """``Path.glob`` raises where a directory that it has found is gone when it is looked into."""
    is_in_system = relative(path).startswith("system/")
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func.attr
            # In one folder nothing is looked into.
            looks_into = called == "rglob" or (called == "glob" and "/" in ast.unparse(node.args[0]))
            may_vanish = looks_into or (is_in_system and called in {"glob", "iterdir"})
            assert not may_vanish, f"line {node.lineno}: system/sysfs.py looks through what comes and goes"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_names_of_others_may_have_any_bytes(path: Path) -> None:
    """A program or a file whose name is not UTF-8, or has a CR in it, must not end or mislead a look."""
    looks_at_others = {"controller/examine_host.py", "operations/label.py", "restore/tree_mount.py"}
    if not relative(path).startswith("system/") and relative(path) not in looks_at_others:
        return
    for node in nodes(path):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "read_text"
        ):
            errors = [ast.unparse(word.value) for word in node.keywords if word.arg == "errors"]
            assert errors == ["'replace'"], f"line {node.lineno}: system/sysfs.py reads what has names in it"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_and_functions_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 500
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_is_asserted_or_swallowed(path: Path) -> None:
    for node in nodes(path):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes with -O"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"


def test_names_say_something() -> None:
    banned = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert not [relative(path) for path in MODULES if banned & set(path.stem.split("_"))]


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(tree(path)), relative(path)
