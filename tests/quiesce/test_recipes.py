"""The hooks that docs/operations.md shows do what it says, as they stand there."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.errors import HookError
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from support.loops import call
from support.require import require
from support.standing import wait_until

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


def written(folder: Path, name: str, text: str) -> Path:
    """A script as its administrator would put it there."""
    script = folder / name
    script.write_text(text)
    script.chmod(0o700)
    return script


def attended(script: Path, **hook: list[str]) -> Standstill:
    settings = QuiesceSettings.model_validate(
        {"deadline_seconds": 120, "hooks": [hook or {"session": [str(script)]}]}
    )
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


def test_redis_writes_a_dump_of_now(hooks: Path) -> None:
    # The server is the same program as its checker, by another name; the latter comes in the smaller package.
    program = shutil.which("redis-check-rdb")
    require(
        "redis", program is not None and shutil.which("redis-cli") is not None, "there are no redis-tools"
    )
    socket = hooks / "socket"
    text = script_with("BGSAVE SCHEDULE").replace("/run/redis/redis-server.sock", str(socket))
    assert str(socket) in text
    script = written(hooks, "dump", text)
    argv = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(hooks), "--save", ""]
    with subprocess.Popen(argv, executable=program, stdout=subprocess.DEVNULL) as server:
        try:
            assert wait_until(socket.exists)

            def ask(*words: str) -> str:
                return call("redis-cli", "-s", socket, *words).strip()

            for count in (1, 2):
                assert ask("SET", f"sale{count}", "paid") == "OK"
                standstill = attended(script, before=[str(script)])
                standstill.begin()
                standstill.end()
                assert standstill.conclude().state == "application"
                standstill.close()
                assert f"sale{count}".encode() in (hooks / "dump.rdb").read_bytes()
                call("redis-check-rdb", hooks / "dump.rdb")
            # A dump cannot be renamed over a directory.
            (hooks / "dump.rdb").unlink()
            (hooks / "dump.rdb").mkdir()
            standstill = attended(script, before=[str(script)])
            with pytest.raises(HookError) as refused:
                standstill.begin()
            standstill.close()
            assert refused.value.details == "the dump failed"
        finally:
            server.terminate()


def test_mongodb_is_locked_and_unlocked_whatever_happened(hooks: Path) -> None:
    # There is no mongod in Debian: what is tried is what the script asks, and what it makes of a refusal.
    log = hooks / "log"
    mongosh = f"""#!/bin/bash
case "$3" in
*fsyncLock\\(*) echo lock >> {log}; [ ! -e {hooks}/refuses ] || {{ echo "not authorized"; exit 1; }} ;;
*fsyncUnlock*) echo unlock >> {log} ;;
esac
"""
    written(hooks, "mongosh", mongosh)
    text = script_with("db.fsyncLock()").replace("exec mongosh", f"exec {hooks}/mongosh")
    script = written(hooks, "mongodb", text)
    pair = {"before": [str(script), "lock"], "after": [str(script), "unlock"]}
    standstill = attended(script, **pair)
    standstill.begin()
    assert log.read_text() == "lock\n"
    standstill.end()
    assert standstill.conclude().state == "application"
    standstill.close()
    assert log.read_text() == "lock\nunlock\n"
    (hooks / "refuses").touch()
    standstill = attended(script, **pair)
    with pytest.raises(HookError, match="failed, with exit status 1") as refused:
        standstill.begin()
    standstill.close()
    assert refused.value.details == "not authorized"
    assert log.read_text() == "lock\nunlock\nlock\nunlock\n"
