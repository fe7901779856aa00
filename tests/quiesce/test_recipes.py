"""The hooks that docs/operations.md shows do what it says, as they stand there."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.errors import HookError
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from support.require import require

DOCUMENT = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def script_with(words: str) -> str:
    """The indented block of the document that begins as a script and has these words in it."""
    for block in DOCUMENT.split("    #!/bin/bash\n")[1:]:
        lines = []
        for line in block.splitlines():
            if line and not line.startswith("    "):
                break
            lines.append(line[4:])
        text = "#!/bin/bash\n" + "\n".join(lines).rstrip() + "\n"
        if words in text:
            return text
    raise AssertionError(f"no script in docs/operations.md has {words!r} in it")


def attended(script: Path) -> Standstill:
    settings = QuiesceSettings.model_validate({"hooks": [{"session": [str(script)]}]})
    standstill = assemble(settings, [], [])
    fd = os.open(os.devnull, os.O_WRONLY)
    standstill.attend(fd, {})
    os.close(fd)
    return standstill


def test_sqlite_is_locked_between_begin_and_end(hooks: Path) -> None:
    require("sqlite", shutil.which("sqlite3") is not None, "there is no sqlite3")
    database, script = hooks / "shop.db", hooks / "lock"
    text = script_with("coproc sqlite3").replace("/srv/shop/shop.db", str(database))
    assert str(database) in text
    script.write_text(text)
    script.chmod(0o700)
    with closing(sqlite3.connect(database, timeout=0.0, isolation_level=None)) as writer:
        writer.execute("CREATE TABLE sales (number INTEGER)")
        standstill = attended(script)
        writer.execute("INSERT INTO sales VALUES (1)")
        standstill.begin()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            writer.execute("INSERT INTO sales VALUES (2)")
        standstill.end()
        assert standstill.conclude().state == "application"
        standstill.close()
        writer.execute("INSERT INTO sales VALUES (3)")

        writer.execute("BEGIN IMMEDIATE")
        standstill = attended(script)
        with pytest.raises(HookError, match="refused: no lock"):
            standstill.begin()
        standstill.close()
