"""Every command in the README is run, or is a target or tool that exists; what it links to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.commands import CommandLine

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INDENTED = [line[4:].split("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
SHOWN = [line[2:] for line in INDENTED if line.startswith("# blocksnap ")]
RUN = [line for line in INDENTED if line.startswith("blocksnap ")]
# Run by CI itself (make test, the clone it installs), by the lab (the transcript), and by make demo.
INSTALLING = ("apt-get install", "python3 -m venv", "/opt/blocksnap/bin/pip install", "ln -s", "export ")


def test_the_readme_shows_commands() -> None:
    assert len(SHOWN) == 2
    assert len(RUN) == 7


def test_commands_on_a_server_work_in_this_order(tmp_path: Path) -> None:
    """On a file in place of vg0/data: this machine's own volumes are not ours to touch."""
    blocksnap = CommandLine(tmp_path, new_interpreters=True)
    volume = tmp_path / "data.img"
    volume.write_bytes(b"content" * 100_000)
    secret = tmp_path / "passphrase"
    secret.write_text("secret\n")
    changes = {"BLOCKSNAP_PASSPHRASE": None, "BLOCKSNAP_PASSPHRASE_FILE": str(secret)}
    for line in RUN:
        words = [str(volume) if word == "vg0/data" else word for word in shlex.split(line)[1:]]
        blocksnap.done(*words, **changes)


def test_the_transcript_s_commands_are_understood(tmp_path: Path) -> None:
    """The lab runs them for real (tests/lvm); here they must get as far as looking for the repository."""
    blocksnap = CommandLine(tmp_path, new_interpreters=True)
    for line in SHOWN:
        assert blocksnap(*shlex.split(line)[1:]).code == 10, line


def test_other_lines_are_targets_or_installation() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in INDENTED:
        words = line.split()
        if not line or line in RUN or line.startswith("# blocksnap"):
            continue
        if words[0] == "make":
            assert words[1] in targets
        elif line.startswith(INSTALLING):
            continue
        else:
            assert re.match(r"(vg0/data:|backup|read|stored|took|restored) ", line), line


def test_packages_to_install_are_in_the_list() -> None:
    line = next(line for line in INDENTED if line.startswith("apt-get install"))
    listed = (ROOT / "vagrant" / "packages.txt").read_text().split()
    assert set(line.split()[3:]) <= set(listed)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/design.md", "docs/operations.md", "docs/benchmarks.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / document).parent / target).exists(), target
