"""debug cow-extents on images: what it prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocksnap.cli.main import run
from support.cow_store import CowStore


def image_of(folder: Path, store: CowStore) -> str:
    path = folder / "store"
    with path.open("wb") as file:
        store.write(file.fileno())
    return str(path)


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["debug", "cow-extents", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_line_for_each_extent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_of(tmp_path, CowStore([9, 3, 4, 700]))
    lines = "12288 8192\n36864 4096\n2867200 4096\n"
    assert show(capsys, image) == (0, lines, "")
    assert show(capsys, image, "--quiet") == (0, "", "")
    code, out, err = show(capsys, image, "--verbose", "--origin-size", str(701 * 4096 - 100))
    assert (code, out) == (0, lines.replace("2867200 4096", "2867200 3996"))
    assert err.startswith("cow: the store of a snapshot that is not active; ")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = show(capsys, image_of(tmp_path, CowStore(range(300))), "--json", "--settled-areas", "1")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document.pop("seconds") >= 0
    assert document == {
        "engine": "cow",
        "reason": "the store of a snapshot that is not active",
        "changed_bytes": 300 * 4096,
        "count": 1,
        "chunk_size": 4096,
        "exceptions": 300,
        "areas": 2,
        "allocated_bytes": 303 * 4096,
        "metadata_bytes": 3 * 4096,
        "extents": [[0, 300 * 4096]],
    }


REFUSALS = [
    ({"valid": 0}, (), "has invalidated the snapshot"),
    ({"magic": 0}, (), "never initialised"),
    ({"magic": 1}, (), "not the exception store"),
    ({"version": 3}, (), "unknown version"),
    ({"chunk_size": 2048}, (), "chunk size"),
    ({}, ("--origin-size", "4096"), "beyond the end of the origin"),
    ({}, ("--settled-areas", "1"), "shorter than the kernel has said"),
]


@pytest.mark.parametrize(("header", "options", "reason"), REFUSALS)
def test_a_store_that_does_not_tell_is_named_with_the_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    header: dict[str, int],
    options: tuple[str, ...],
    reason: str,
) -> None:
    image = image_of(tmp_path, CowStore([5, 6], **header))  # type: ignore[arg-type]
    code, out, err = show(capsys, image, *options)
    assert (code, out) == (14, "")
    first, second = err.splitlines()
    assert first.startswith(f"error: {image} does not tell what changed: exception store, block ")
    assert reason in first
    assert second.startswith("fix:   ")


@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("/nonexistent", 2, "cannot open /nonexistent: No such file or directory"),
        ("/dev/null", 14, "it cannot be read: fstat: Block device required"),
        ("/", 14, "it cannot be read: fstat: Block device required"),
    ],
)
def test_what_is_no_device(capsys: pytest.CaptureFixture[str], device: str, code: int, message: str) -> None:
    assert show(capsys, device)[0] == code
    assert message in show(capsys, device)[2]


@pytest.mark.parametrize("options", [("--origin-size", "0"), ("--settled-areas", "-1"), ("--nonsense",)])
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    assert show(capsys, image_of(tmp_path, CowStore([])), *options)[0] == 2
