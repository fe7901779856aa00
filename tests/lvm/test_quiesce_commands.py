"""Jobs whose applications stand still, through the command line: what is told, and with which exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.in_process import InProcess
from support.lvm_lab import ThinPool, write_at
from support.standing import hook_folder, read_log, write_hook

CONFIGURATION = """
[jobs.shop]
volumes = ["{data}", "{wal}"]

[jobs.shop.quiesce]
deadline_seconds = 600
on_failure = "{policy}"

[[jobs.shop.quiesce.hooks]]
before = ["{hook}", "stop"]
after = ["{hook}", "start"]
"""


@pytest.fixture
def hooks() -> Iterator[Path]:
    with hook_folder() as folder:
        yield folder


def test_a_job_with_hooks(pool: ThinPool, hooks: Path, blocksnap: InProcess, tmp_path: Path) -> None:
    data, wal = pool.create("data", "8M"), pool.create("wal", "8M")
    for name in ("data", "wal"):
        write_at(pool.node(name), 0, b"content")
    hook = write_hook(hooks, "shop", 'log "$1 for $BLOCKSNAP_JOB: $(echo $BLOCKSNAP_VOLUMES)"')

    def configure(policy: str) -> None:
        text = CONFIGURATION.format(data=data, wal=wal, hook=hook, policy=policy)
        (tmp_path / "blocksnap.toml").write_text(text)

    configure("fail")
    both = json.loads(blocksnap.done("backup", "--json", "--job", "shop").splitlines()[-1])["backups"]
    assert read_log(hooks) == [f"{word} for shop: {data} {wal}" for word in ("stop", "start")]
    for each in both:
        quiesced = each["quiesced"]
        assert (quiesced["state"], quiesced["by"], quiesced["reason"]) == (
            "application",
            [f"hook {hook}"],
            None,
        )
        assert each["consistency"] == "application"
        assert each["freeze_ms"] == quiesced["ms"] > each["skew_ms"] > 0
    shown = blocksnap.done("show", "latest").decode()
    assert f"hook {hook}, for " in shown

    # A dry run asks nobody to stand still, and nor does a backup that no job asks for.
    blocksnap.done("backup", "--dry-run", "--job", "shop")
    assert blocksnap.backup(data)["quiesced"] == {"state": "none"}
    assert len(read_log(hooks)) == 2

    write_hook(hooks, "shop", 'log "$1"; [ "$1" = start ] || { echo the shop is busy >&2; exit 1; }')
    code, out, err = blocksnap("backup", "--job", "shop")
    assert (code, out) == (15, b"")
    assert f"error: the hook {hook} failed, with exit status 1" in err
    assert "the shop is busy" in err
    assert read_log(hooks)[2:] == ["stop", "start"]
    assert pool.snapshots() == []

    configure("crash-consistent")
    code, out, err = blocksnap("backup", "--json", "--job", "shop")
    assert code == 3
    assert "only crash-consistent, as the job allows" in err + out.decode()
    (each, _) = json.loads(out.splitlines()[-1])["backups"]
    assert (each["quiesced"]["state"], each["consistency"]) == ("failed", "crash")
    assert each["quiesced"]["reason"] == f"the hook {hook} failed, with exit status 1"
    assert read_log(hooks)[4:] == ["stop", "start"]
    assert pool.snapshots() == []
    pool.remove("data", "wal")
