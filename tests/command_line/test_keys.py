"""Keys and roles as processes: what each role may do, how the rest is refused, and no passphrase shows."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from support.commands import PASSPHRASE, CommandLine
from support.in_process import InProcess

MIB = 1 << 20
ROLES = ("admin", "restore", "backup", "gc")
SUBCOMMANDS = ("list", "add", "remove", "change", "show")


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    command = CommandLine(tmp_path)
    command.done("init")
    return command


@pytest.fixture
def costly(tmp_path: Path) -> CommandLine:
    """A repository whose first key takes as much work as those of users."""
    CommandLine(tmp_path, new_interpreters=True).done("init")
    return CommandLine(tmp_path)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.img"
    path.write_bytes(random.Random(1).randbytes(MIB) + bytes(MIB))
    return path


def add(blocksnap: CommandLine, passphrase: str, role: str, *more: str) -> str:
    told = blocksnap.done("key", "add", "--role", role, "--json", *more, BLOCKSNAP_NEW_PASSPHRASE=passphrase)
    key: str = told.document["key"]["id"]
    return key


def as_role(blocksnap: CommandLine, passphrase: str) -> CommandLine:
    other = CommandLine(blocksnap.folder)
    other.environment["BLOCKSNAP_PASSPHRASE"] = passphrase
    return other


def test_every_subcommand_has_help_and_rejects_the_unknown(tmp_path: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    listed = blocksnap.done("key", "--help").text
    for command in SUBCOMMANDS:
        assert command in listed
        shown = blocksnap.done("key", command, "--help").text
        for option in ("--repo", "--passphrase-file", "--key", "--json", "--quiet", "--verbose"):
            assert option in shown
        assert blocksnap("key", command, "--no-such-option").code == 2


def test_keys_from_first_to_last(costly: CommandLine, tmp_path: Path) -> None:
    blocksnap = costly
    (first,) = blocksnap.done("key", "list", "--json", BLOCKSNAP_PASSPHRASE=None).document["keys"]
    assert (first["role"], first["host"]) == ("admin", os.uname().nodename)
    assert first["argon2id"]["memory_bytes"] == 64 * MIB
    secret = tmp_path / "new"
    secret.write_text("from a file\n")
    told = blocksnap.done(
        "key",
        "add",
        "--role",
        "restore",
        "--label",
        "the safe",
        "--host",
        "",
        "--new-passphrase-file",
        secret,
    )
    assert "added key" in told.text
    second = blocksnap.done("key", "list", "--json").document["keys"][1]
    assert (second["role"], second["label"], second["host"]) == ("restore", "the safe", "")
    shown = blocksnap.done("key", "show", "--json", BLOCKSNAP_PASSPHRASE="from a file").document
    assert shown["key"] == second
    assert shown["rights"] == ["read", "identify"]
    assert "the safe" in blocksnap.done("key", "show", second["id"][:8], BLOCKSNAP_PASSPHRASE=None).text
    table = blocksnap.done("key", "list").text.splitlines()
    assert [line.split()[1] for line in table] == ["ROLE", "admin", "restore"]
    changed = blocksnap.done(
        "key",
        "change",
        "--json",
        BLOCKSNAP_PASSPHRASE="from a file",
        BLOCKSNAP_NEW_PASSPHRASE_COMMAND="echo new",
    ).document
    assert changed["removed"] == second["id"]
    assert (changed["key"]["role"], changed["key"]["label"]) == ("restore", "the safe")
    assert blocksnap("list", BLOCKSNAP_PASSPHRASE="from a file").code == 12
    blocksnap.done("list", BLOCKSNAP_PASSPHRASE="new")
    removed = blocksnap.done("key", "remove", changed["key"]["id"][:8], "--json").document
    assert removed == {"removed": changed["key"]["id"]}
    assert blocksnap("list", BLOCKSNAP_PASSPHRASE="new").code == 12
    refused = blocksnap("key", "remove", first["id"])
    assert (refused.code, len(refused.errors)) == (2, 1), refused
    assert "--force" in refused.stderr
    blocksnap.done("key", "remove", first["id"], "--force")
    assert blocksnap("list").code == 12


@pytest.mark.parametrize("role", ROLES)
def test_what_each_role_may_do(
    volume: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    role: str,
) -> None:
    """In this process, because starting some hundred of them is what would take the time."""
    blocksnap = InProcess(tmp_path, monkeypatch, capsysbinary)
    blocksnap.done("init")
    backup = blocksnap.backup(str(volume))["id"]
    keys = {}
    for passphrase, its_role in (("another", "gc"), ("role's own", role)):
        monkeypatch.setenv("BLOCKSNAP_NEW_PASSPHRASE", passphrase)
        keys[passphrase] = json.loads(blocksnap.done("key", "add", "--role", its_role, "--json"))["key"]["id"]
    with volume.open("r+b") as file:
        file.write(b"changed")
    monkeypatch.setenv("BLOCKSNAP_PASSPHRASE", "role's own")
    monkeypatch.setenv("BLOCKSNAP_NEW_PASSPHRASE", "a third")
    monkeypatch.setenv("BLOCKSNAP_KEY", keys["role's own"])
    cases: list[tuple[set[str], list[str | Path]]] = [
        ({"admin", "restore"}, ["restore", backup, tmp_path / "out"]),
        ({"admin", "restore"}, ["restore", backup, "-"]),
        ({"admin", "restore"}, ["verify", backup]),
        ({"admin", "restore"}, ["check", "--read-data"]),
        ({"admin", "backup"}, ["backup", volume]),
        ({"admin", "backup"}, ["backup", volume, "--full"]),
        ({"admin"}, ["key", "add", "--role", "gc"]),
        ({"admin"}, ["key", "remove", keys["another"]]),
        (set(ROLES), ["list"]),
        (set(ROLES), ["show", "latest"]),
        (set(ROLES), ["check"]),
        (set(ROLES), ["key", "show"]),
    ]
    for allowed, arguments in cases:
        code, out, err = blocksnap(*arguments)
        if role in allowed:
            assert code == 0, (arguments, err)
            continue
        (error,) = (line for line in err.splitlines() if line.startswith("error:"))
        assert (code, out) == (12, b""), (arguments, err)
        assert f"a {role} key, and" in error
        assert all(name in error.rpartition("needs role")[2] for name in allowed)
    assert (tmp_path / "out").exists() == (role in {"admin", "restore"})
    assert blocksnap("verify", "latest", volume)[0] == {"gc": 12, "restore": 1}.get(role, 0)
    monkeypatch.setenv("BLOCKSNAP_NEW_PASSPHRASE", "changed")
    blocksnap.done("key", "change")
    monkeypatch.setenv("BLOCKSNAP_PASSPHRASE", "changed")
    monkeypatch.delenv("BLOCKSNAP_KEY")
    assert json.loads(blocksnap.done("key", "show", "--json"))["key"]["role"] == role


def test_hosts_that_cannot_read_share_chunks_with_those_that_can(
    blocksnap: CommandLine, volume: Path, tmp_path: Path
) -> None:
    add(blocksnap, "host one", "backup")
    add(blocksnap, "host two", "backup")
    add(blocksnap, "safe", "restore")
    copy = tmp_path / "copy.img"
    copy.write_bytes(volume.read_bytes())
    first = as_role(blocksnap, "host one").done("backup", volume, "--json").backups[0]
    assert first["new_bytes"] == MIB
    second = as_role(blocksnap, "host two").done("backup", copy, "--json").backups[0]
    assert second["new_bytes"] == 0
    with volume.open("r+b") as file:
        file.write(b"changed")
    third = as_role(blocksnap, "host two").done("backup", volume, "--json").backups[0]
    assert (third["kind"], third["parent"]) == ("incremental", first["id"])
    assert third["new_bytes"] == 128 << 10
    safe = as_role(blocksnap, "safe")
    assert safe.done("restore", third["id"], "-").stdout == volume.read_bytes()
    assert safe.done("restore", second["id"], "-").stdout == copy.read_bytes()
    safe.done("check", "--read-data")


def test_errors_say_what_to_do(blocksnap: CommandLine, tmp_path: Path) -> None:
    key = add(blocksnap, "second", "backup")
    cases: list[tuple[int, list[str | Path], dict[str, str | None]]] = [
        (12, ["key", "add", "--role", "gc"], {}),
        (12, ["key", "change"], {}),
        (12, ["key", "change", "--new-passphrase-file", tmp_path / "missing"], {}),
        (12, ["key", "change"], {"BLOCKSNAP_NEW_PASSPHRASE": ""}),
        (12, ["key", "change"], {"BLOCKSNAP_NEW_PASSPHRASE_COMMAND": "false"}),
        (12, ["key", "change"], {"BLOCKSNAP_NEW_PASSPHRASE_COMMAND": "no-such-program"}),
        (12, ["key", "show"], {"BLOCKSNAP_PASSPHRASE": "wrong"}),
        (12, ["list", "--key", key], {}),
        (2, ["list", "--key", "ffff"], {}),
        (2, ["key", "show", "ffff"], {}),
        (2, ["key", "remove", "ffff"], {}),
        (2, ["key", "add", "--role", "gc"], {"BLOCKSNAP_NEW_PASSPHRASE": "second"}),
        (2, ["key", "change"], {"BLOCKSNAP_NEW_PASSPHRASE": PASSPHRASE}),
        (2, ["key", "add", "--role", "gc", "--label", "two\nlines"], {"BLOCKSNAP_NEW_PASSPHRASE": "x"}),
        (2, ["key", "add", "--role", "gc", "--host", "x" * 201], {"BLOCKSNAP_NEW_PASSPHRASE": "x"}),
        (10, ["key", "list", "--repo", tmp_path], {}),
        (10, ["key", "show", "ffff", "--repo", tmp_path / "nothing"], {}),
    ]
    for code, arguments, environment in cases:
        outcome = blocksnap(*arguments, "--json", **environment)
        assert (outcome.code, len(outcome.errors)) == (code, 1), (arguments, outcome)
        assert "Traceback" not in outcome.stderr
        assert outcome.events[-1]["exit_code"] == code
    assert blocksnap("key", "add").code == 2
    assert len(blocksnap.done("key", "list", "--json").document["keys"]) == 2


def test_without_encryption_there_are_no_keys(tmp_path: Path) -> None:
    command = CommandLine(tmp_path)
    command.done("init", "--no-encryption")
    assert command.done("key", "list", "--json").document == {"encryption": "none", "keys": []}
    for arguments in (["add", "--role", "gc"], ["remove", "ab"], ["change"], ["show"], ["show", "ab"]):
        outcome = command("key", *arguments, BLOCKSNAP_NEW_PASSPHRASE="x")
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome


def test_a_damaged_key_is_warned_of(blocksnap: CommandLine) -> None:
    key = add(blocksnap, "second", "backup")
    path = blocksnap.repository / "keys" / key
    path.write_bytes(path.read_bytes()[:-1])
    for arguments in (["list"], ["key", "list"], ["key", "show"]):
        outcome = blocksnap(*arguments)
        assert outcome.code == 3, (arguments, outcome)
        assert f"warning: keys/{key} is damaged" in outcome.stderr
    assert blocksnap("list", BLOCKSNAP_PASSPHRASE="second").code == 12
    assert blocksnap("key", "show", key).code == 13
    assert blocksnap("check").code == 13
    assert blocksnap("key", "remove", key).code == 3
    blocksnap.done("check")


def test_a_storage_that_does_not_delete(blocksnap: CommandLine) -> None:
    """The folder is immutable but for new files: chattr +a, which is what append-only means on ext4."""
    keys = blocksnap.repository / "keys"
    key = add(blocksnap, "second", "admin")
    made = subprocess.run(["chattr", "+a", keys], check=False, capture_output=True)
    if made.returncode:
        pytest.skip(f"no chattr +a here: {made.stderr.decode().strip()}")
    try:
        add(blocksnap, "third", "backup")
        for arguments in (["key", "remove", key], ["key", "change"]):
            refused = blocksnap(*arguments, BLOCKSNAP_NEW_PASSPHRASE="fourth")
            assert (refused.code, len(refused.errors)) == (1, 1), refused
            assert "still opens" in refused.stderr
            assert "append-only" in refused.stderr
    finally:
        subprocess.run(["chattr", "-a", keys], check=True)
    for passphrase in (PASSPHRASE, "second", "third", "fourth"):
        blocksnap.done("list", BLOCKSNAP_PASSPHRASE=passphrase)


def test_the_terminal_is_asked_twice_for_a_new_passphrase(blocksnap: CommandLine) -> None:
    ours, theirs = pty.openpty()
    # A session of its own has no other terminal to ask on.
    process = subprocess.Popen(
        blocksnap.argv("key", "change"),
        env={k: v for k, v in blocksnap.environment.items() if k != "BLOCKSNAP_PASSPHRASE"},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    answers = [
        (b"Passphrase: ", PASSPHRASE),
        (b"New passphrase: ", "typed"),
        (b"confirmation: ", "tpyed"),
        (b"New passphrase: ", "typed"),
        (b"confirmation: ", "typed"),
    ]
    for question, answer in answers:
        heard = b""
        while question not in heard:
            heard += os.read(ours, 1000)
        said += heard
        os.write(ours, answer.encode() + b"\n")
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, said
    assert b"replaces" in stdout
    assert b"typed" not in said
    assert PASSPHRASE.encode() not in said
    blocksnap.done("list", BLOCKSNAP_PASSPHRASE="typed")
    assert blocksnap("list").code == 12


SECRETS = {"BLOCKSNAP_PASSPHRASE": "old-6f1c-secret", "BLOCKSNAP_NEW_PASSPHRASE": "new-77aa-secret"}


def test_no_passphrase_in_any_output(tmp_path: Path, volume: Path) -> None:
    """Success, failure, damage and every verbosity; what is stored is searched as well."""
    command = CommandLine(tmp_path)
    command.environment |= SECRETS
    said = ""
    for arguments in (
        ["init", "-v"],
        ["backup", volume, "-vv"],
        ["key", "add", "--role", "backup", "-vv", "--json"],
        ["key", "add", "--role", "backup", "-vv"],
        ["key", "change", "-vv", "--json"],
        ["key", "show", "--json"],
        ["check", "--read-data", "--json"],
    ):
        outcome = command(*arguments)
        said += outcome.text + outcome.stderr
    wrong = command("list", "-vv", "--json", BLOCKSNAP_PASSPHRASE="old-6f1c-secret-wrong")
    assert wrong.code == 12
    said += wrong.text + wrong.stderr
    for path in (command.repository / "keys").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
        outcome = command("list", "-vv", "--json")
        said += outcome.text + outcome.stderr
    said += command(
        "list", BLOCKSNAP_PASSPHRASE=None, BLOCKSNAP_PASSPHRASE_COMMAND="echo old-6f1c-secret"
    ).stderr
    failing = "sh -c 'echo old-6f1c-secret; exit 3'"
    failed = command("list", BLOCKSNAP_PASSPHRASE=None, BLOCKSNAP_PASSPHRASE_COMMAND=failing)
    assert failed.code == 12, failed
    said += failed.text + failed.stderr
    assert "6f1c" not in said
    assert "77aa" not in said
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != volume)
    assert b"6f1c-secret" not in stored
    assert b"77aa-secret" not in stored


_BROKEN = """
import sys
from blocksnap.cli import main
from blocksnap.repository import key_objects
def broken(*arguments, **named):
    raise RuntimeError("inside")
setattr(key_objects, sys.argv.pop(1), broken)
main.main()
"""


@pytest.mark.parametrize("function", ["passphrase_key", "unwrap", "wrap"])
def test_no_passphrase_in_a_traceback(tmp_path: Path, function: str) -> None:
    """A mistake of ours, deep inside, ends in Python's own traceback: that may be sent to anybody."""
    command = CommandLine(tmp_path)
    command.environment |= SECRETS
    command.done("init")
    ended = subprocess.run(
        [sys.executable, "-c", _BROKEN, function, "key", "change", "--json", "-vv"],
        env=command.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    told = ended.stdout.decode() + ended.stderr.decode()
    assert "RuntimeError: inside" in told
    assert "6f1c" not in told
    assert "77aa" not in told


def test_no_passphrase_in_any_argument_of_any_process(blocksnap: CommandLine, tmp_path: Path) -> None:
    """What ps shows of the command and of the programs that it starts, for as long as it runs."""
    slow = tmp_path / "ask"
    # Tests beside this one may have the usual one in arguments.
    old, new = f"ours since {uuid4().hex}", f"typed by a program {uuid4().hex}"
    blocksnap.done("key", "change", BLOCKSNAP_NEW_PASSPHRASE=old)
    (tmp_path / "new").write_text(new)
    slow.write_text("#!/bin/sh\nwhile [ ! -e $0.seen ]; do sleep 0.1; done\ncat ${0%ask}new\nenv > $0.env\n")
    slow.chmod(0o755)
    process = blocksnap.start(
        "key", "change", BLOCKSNAP_PASSPHRASE=old, BLOCKSNAP_NEW_PASSPHRASE=None,
        BLOCKSNAP_NEW_PASSPHRASE_COMMAND=str(slow),
    )  # fmt: skip
    seen: set[bytes] = set()
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.add(entry.read_bytes())
            except OSError:
                continue
        if any(str(slow).encode() in words for words in seen):
            Path(f"{slow}.seen").touch()
        time.sleep(0.01)
    process.communicate()
    assert process.returncode == 0
    assert any(b"key\0change" in words for words in seen)
    assert any(str(slow).encode() in words for words in seen)
    for words in seen:
        assert new.encode() not in words
        assert old.encode() not in words
    # Nor do programs that are started inherit it.
    assert old not in Path(f"{slow}.env").read_text()
    blocksnap.done("list", BLOCKSNAP_PASSPHRASE=new)


def test_kill_at_any_moment_of_a_change(costly: CommandLine) -> None:
    """Killed a little later each time: one of the two passphrases opens, and the change can be finished."""
    blocksnap = costly
    words = [PASSPHRASE, "the other"]
    for attempt in range(5):
        old, new = words
        environment = {"BLOCKSNAP_PASSPHRASE": old, "BLOCKSNAP_NEW_PASSPHRASE": new}
        process = blocksnap.start("key", "change", **environment)
        try:
            process.wait(timeout=0.3 + attempt * 0.2)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if blocksnap("list", BLOCKSNAP_PASSPHRASE=old).code == 0:
            blocksnap.done("key", "change", **environment)
        blocksnap.done("list", BLOCKSNAP_PASSPHRASE=new)
        assert len(json.loads(blocksnap.done("key", "list", "--json").text)["keys"]) == 1
        words.reverse()
