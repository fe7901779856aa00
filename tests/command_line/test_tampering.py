"""What a command ends with when stored objects were changed, swapped, removed or brought from elsewhere.

That each byte of each object matters is shown in tests/tampering.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.in_process import InProcess

Change = Callable[[Path, Path], None]


def newest(place: Path, folder: str) -> list[Path]:
    files = [path for path in (place / folder).rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def delete(folder: str) -> Change:
    return lambda place, _: newest(place, folder)[-1].unlink()


def swap(folder: str) -> Change:
    def change(place: Path, _: Path) -> None:
        one, *_, other = newest(place, folder)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)

    return change


def replay(folder: str) -> Change:
    """Put an older object in the place of the newest."""

    def change(place: Path, _: Path) -> None:
        first, *_, last = newest(place, folder)
        last.write_bytes(first.read_bytes())

    return change


def bring(folder: str) -> Change:
    """Put the object of another repository in the place of the newest."""

    def change(place: Path, elsewhere: Path) -> None:
        newest(place, folder)[-1].write_bytes(newest(elsewhere, folder)[-1].read_bytes())

    return change


def bring_config(place: Path, elsewhere: Path) -> None:
    shutil.copy(elsewhere / "config", place / "config")


CASES: list[tuple[str, Change, int, int]] = [
    # name, change, exit code of check --read-data, of a restore of the newest backup
    ("delete config", lambda place, _: (place / "config").unlink(), 10, 10),
    ("delete the key", delete("keys"), 12, 12),
    ("delete a manifest", delete("manifests"), 13, 2),
    ("delete a segment", delete("index"), 13, 13),
    ("delete a pack", delete("packs"), 13, 13),
    ("delete a writer record", delete("writers"), 0, 0),
    ("swap manifests", swap("manifests"), 13, 13),
    ("swap segments", swap("index"), 0, 0),
    ("swap packs", swap("packs"), 13, 13),
    ("swap writer records", swap("writers"), 13, 0),
    ("replay a manifest", replay("manifests"), 13, 13),
    ("replay a segment", replay("index"), 13, 13),
    ("another config", bring_config, 13, 13),
    ("another key", bring("keys"), 13, 13),
    ("another manifest", bring("manifests"), 13, 13),
    ("another segment", bring("index"), 13, 3),
    ("another pack", bring("packs"), 13, 13),
    ("another writer record", bring("writers"), 13, 0),
]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    return InProcess(tmp_path, monkeypatch, capsysbinary)


def test_an_older_state_of_the_repository_is_noticed_by_the_host(run: InProcess) -> None:
    volumes, place, older = (
        [run.folder / name for name in "ab"],
        run.folder / "repository",
        run.folder / "older",
    )
    run.done("init", "--chunk-size", "16K")
    for volume in volumes:
        volume.write_bytes(b"first")
        run.done("backup", volume)
    shutil.copytree(place, older)
    volumes[0].write_bytes(b"second")
    run.done("backup", volumes[0])
    shutil.rmtree(place)
    older.rename(place)
    # In it everything is sound, and the other volume misses nothing.
    run.done("check", "--read-data")
    run.done("backup", volumes[1])
    code, _, said = run("backup", volumes[0])
    assert code == 3
    assert f"the newest backup of {volumes[0]} that this host made is not in the repository" in said
    assert "fix:" in said
    assert run.done("restore", "latest", "-") == b"second"
    run.done("backup", volumes[0])
    newest(place, "manifests")[-1].unlink()
    assert run("backup", volumes[0])[0] == 3
    # Another repository at this place is another matter.
    shutil.rmtree(place)
    run.done("init")
    run.done("backup", volumes[0])


def test_exit_codes(run: InProcess, tmp_path: Path) -> None:
    dice, volume = random.Random(1), tmp_path / "volume"
    theirs, ours, saved = (tmp_path / name for name in ("theirs", "repository", "saved"))
    for place in (theirs, ours):
        run.done("init", "--repo", place, "--chunk-size", "16K")
        for _ in range(2):
            volume.write_bytes(dice.randbytes(200 << 10))
            run.done("backup", volume, "--repo", place)
    id_ = json.loads(run.done("list", "--json"))["backups"][-1]["id"]
    shutil.copytree(ours, saved)
    for name, change, check_code, restore_code in CASES:
        change(ours, theirs)
        # What a host knows that has seen none of it before.
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        code, checked, _ = run("check", "--read-data", "--json")
        assert code == check_code, (name, checked)
        if name == "delete a manifest":
            found = {finding["object"]: finding["message"] for finding in json.loads(checked)["findings"]}
            (gone,) = (message for name, message in found.items() if name.startswith("manifests/"))
            assert gone.startswith("it is gone"), found
        code, restored, said = run("restore", id_, "-")
        assert code == restore_code, (name, said)
        if restore_code in (0, 3):
            assert restored == volume.read_bytes(), name
        shutil.rmtree(ours)
        shutil.copytree(saved, ours)
    assert json.loads(run.done("check", "--read-data", "--json"))["findings"] == []
