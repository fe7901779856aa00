"""The rules of the C core that a compiler does not enforce."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.require import require

NATIVE = Path(__file__).parents[3] / "native"
BINDING = NATIVE / "python"
CORE = sorted(path for folder in (NATIVE, BINDING) for path in folder.glob("*.[ch]"))
ALL = sorted(path for path in NATIVE.rglob("*.[ch]"))
MAX_FUNCTION_LINES = 60

ALLOCATES = re.compile(r"\b(?:malloc|calloc|realloc|aligned_alloc|posix_memalign|strdup|free)\s*\(")
# A variable outside functions that is not const: it begins in the first column and has an initialiser.
VARIABLE = re.compile(r"^(?!(?:static )?const\b)(?:[a-zA-Z_]\w* )+\*?(\w+)(?:\[\d*\])? = ", re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def code_of(path: Path) -> str:
    """Return the text of a file with its comments blanked, so that line numbers stay."""
    return COMMENT.sub(lambda match: "\n" * match.group().count("\n"), path.read_text())


def named(path: Path) -> str:
    return str(path.relative_to(NATIVE))


def functions(text: str) -> list[tuple[int, int]]:
    """Return first line and length of every function body: from a brace in column 0 to the next."""
    found, begin = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("{"):
            begin = number
        elif line == "}" and begin:
            found.append((begin, number - begin + 1))
            begin = 0
    return found


def test_there_is_something_to_look_at() -> None:
    assert {"thin_scan.c", "thin_meta.h"} <= {path.name for path in CORE}
    assert any(length > 10 for _, length in functions(code_of(NATIVE / "thin_scan.c")))


@pytest.mark.parametrize("path", ALL, ids=named)
def test_only_the_binding_knows_python(path: Path) -> None:
    if path.parent != BINDING:
        assert "Python.h" not in code_of(path)
        assert "binding.h" not in code_of(path)


@pytest.mark.parametrize("path", CORE, ids=named)
def test_only_one_file_allocates(path: Path) -> None:
    if path.name != "memory.c":
        assert not ALLOCATES.findall(code_of(path))


@pytest.mark.parametrize("path", ALL, ids=named)
def test_functions_are_short(path: Path) -> None:
    too_long = [(line, length) for line, length in functions(code_of(path)) if length > MAX_FUNCTION_LINES]
    assert not too_long


@pytest.mark.parametrize("path", ALL, ids=named)
def test_every_file_names_its_licence(path: Path) -> None:
    assert path.read_text().startswith("/* SPDX-License-Identifier: Apache-2.0 */\n")


@pytest.mark.parametrize("path", [path for path in CORE if path.suffix == ".c"], ids=named)
def test_no_global_state(path: Path) -> None:
    """What stands outside functions and is not const would be shared by threads and interpreters."""
    allowed = {"memory.c": {"allocations_left"}, "module.c": {"methods", "slots", "definition"}}
    # Python's tables of functions are not const in its own headers; nobody writes to them.
    default = {"methods"} if path.parent == BINDING else set()
    found = set(VARIABLE.findall(code_of(path)))
    assert found <= allowed.get(path.name, default)


def test_exported_names_have_the_prefix() -> None:
    for path in (path for path in CORE if path.suffix == ".h"):
        declared = re.findall(r"^(?!static)[a-z_][\w ]*[ *](\w+)\([^;{]*\);", code_of(path), re.MULTILINE)
        assert all(name.startswith("bs_") for name in declared), path


def test_formatting() -> None:
    require("clang-format", shutil.which("clang-format") is not None, "clang-format is not installed")
    command = ["clang-format", "--dry-run", "-Werror", *map(str, ALL)]
    done = subprocess.run(command, cwd=NATIVE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
