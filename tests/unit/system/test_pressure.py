from __future__ import annotations

from pathlib import Path

from blocksnap.system.pressure import find_pressure_files, longest_wait


def group(path: Path, total: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write(path / "io.pressure", total)
    return path / "io.pressure"


def write(path: Path, total: int) -> None:
    path.write_text(f"some avg10=1.00 avg60=0.00 avg300=0.00 total={total}\nfull avg10=0.00 total=7\n")


def test_the_groups_beside_ours_are_everybody_else(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(root)
    (root / "cgroup.controllers").write_text("io memory\n")
    expected = [
        group(root / "user.slice"),
        group(root / "system.slice" / "postgresql.service"),
        group(root / "system.slice" / "ssh.service"),
    ]
    group(root / "user.slice" / "inner")
    group(root / "system.slice")
    group(root / "system.slice" / "blocksnap.service")
    group(root / "system.slice" / "blocksnap.service" / "child")
    own.write_text("0::/system.slice/blocksnap.service\n")
    found = find_pressure_files([tmp_path / "none", root], own, tmp_path / "nothing")
    assert found is not None
    assert (sorted(found.paths), found.ours_too) == (sorted(expected), False)


def test_without_groups_the_host_is_asked(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    root.mkdir()
    (root / "cgroup.controllers").touch()
    own.write_text("1:cpu:/\n0::/\n")
    assert find_pressure_files([root], own, tmp_path / "io") is None
    write(tmp_path / "io", 5)
    found = find_pressure_files([root], own, tmp_path / "io")
    assert found is not None
    assert (found.paths, found.ours_too) == ((tmp_path / "io",), True)


def test_the_most_hindered_counts_since_the_last_look(tmp_path: Path) -> None:
    one, two = group(tmp_path / "one", 100), group(tmp_path / "two", 1000)
    gone = tmp_path / "gone" / "io.pressure"
    before: dict[Path, int] = {}
    assert longest_wait([one, two, gone], before) == 0
    write(one, 400)
    write(two, 1200)
    assert longest_wait([one, two, gone], before) == 300
    assert longest_wait([one, two, gone], before) == 0
