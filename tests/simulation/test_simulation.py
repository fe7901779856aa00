"""Backups, restores, forgetting and garbage collection at once, in worlds where everything goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from blake3 import blake3
from simulated_story import Story, small_world

from blocksnap.errors import BlocksnapError, StorageError

SEEDS = int(os.environ.get("BLOCKSNAP_SEEDS", "200"))
FIRST_SEED = int(os.environ.get("BLOCKSNAP_FIRST_SEED", "0"))


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_world(monkeypatch, tmp_path)


def tolerant(work: Callable[[], None], times: int) -> Callable[[], None]:
    """Do something several times; what fails is tried again, as a timer would."""

    def process() -> None:
        for _ in range(times):
            try:
                work()
            except StorageError:
                continue
            except BlocksnapError as err:
                # Shut out, or it met something that was just deleted: the next run does it.
                if type(err).__name__ not in {"FencedError", "ObjectMissingError"}:
                    raise

    return process


def play(seed: int) -> Story:
    story = Story(seed)
    processes = {
        "writer-1": tolerant(lambda: story.back_up("a"), 3),
        "writer-2": tolerant(lambda: story.back_up("b"), 3),
        "forget": tolerant(story.forget, 3),
        "restore": tolerant(story.restore, 2),
        "prune-1": tolerant(story.prune, 2),
        "prune-2": tolerant(story.prune, 2),
    }
    for _ in range(2):
        story.world.run(processes)
        story.check()
    story.world.deaths = story.world.troubles = 0
    story.world.now += timedelta(days=1)
    story.world.run({"writer": tolerant(lambda: story.back_up("a"), 3), "prune": story.prune})
    story.world.run({"prune": story.prune})
    story.check()
    return story


@pytest.mark.timeout(0)
def test_nothing_is_lost_in_any_world() -> None:
    collected = 0
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        try:
            collected += play(seed).collected
        except BaseException as err:
            raise AssertionError(f"seed {seed}: {err!r}") from err
    assert collected > SEEDS // 2


def told(seeds: range, folder: Path) -> str:
    """Return a digest of the stories that seeds tell."""
    stories = blake3()
    with pytest.MonkeyPatch.context() as patched:
        small_world(patched, folder)
        for seed in seeds:
            stories.update("\n".join(play(seed).world.story).encode())
    return stories.hexdigest()


def test_a_seed_tells_the_same_story_in_every_process(tmp_path: Path) -> None:
    """Sets of names are in another order in each."""
    program = "import sys; from pathlib import Path; from test_simulation import told; "
    program += "print(told(range(30), Path(sys.argv[1])))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / order)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": order},
            stdout=subprocess.PIPE,
        )
        for order in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in running)
    assert len(first) == 65
    assert first == second
