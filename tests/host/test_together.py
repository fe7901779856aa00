"""Many processes on one repository, killed at random: four back up, others prune, check and restore."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from support.commands import CommandLine, Outcome

SECONDS = float(os.environ.get("BLOCKSNAP_SOAK_SECONDS", "20"))
SEED = int(os.environ.get("BLOCKSNAP_FIRST_SEED", "0"))
SIZE = 4 << 20
CHUNK = 128 << 10
KILLED = -signal.SIGKILL
KINDS = ("backup", "prune", "check", "restore")


class Household:
    """What each process does, and what has to be true of what was reported done."""

    def __init__(self, command: CommandLine, folder: Path) -> None:
        self.command, self.folder = command, folder
        self.contents: dict[str, bytes] = {}
        """Hash of the content of each backup that was reported done."""
        self.given_up: set[str] = set()
        self.ends: dict[str, int] = {}
        self._lock = threading.Lock()
        self._until = time.monotonic() + SECONDS

    def goes_on(self) -> bool:
        """Whether it is too early to end: the time is not up, or something has not succeeded even once."""
        return time.monotonic() < self._until or not all(self.ends.get(f"{kind} 0") for kind in KINDS)

    def run(self) -> None:
        """Let everybody work until it is time; what one of them found wrong is raised."""
        wrong: list[BaseException] = []

        def live(work: Callable[[random.Random], None], luck: random.Random) -> None:
            try:
                while self.goes_on() and not wrong:
                    work(luck)
            except BaseException as err:  # noqa: BLE001 - raised again below
                wrong.append(err)

        works: list[Callable[[random.Random], None]] = [
            *(self.writer(number) for number in range(4)),
            self.prune,
            self.check,
            self.restore,
        ]
        threads = [
            threading.Thread(target=live, args=(work, random.Random(SEED * 100 + number)), daemon=True)
            for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]

    def writer(self, number: int) -> Callable[[random.Random], None]:
        """Return what changes a volume and backs it up; the volumes have much in common."""
        volume = self.folder / f"volume-{number}.img"
        volume.write_bytes(random.Random(7).randbytes(SIZE))

        def work(luck: random.Random) -> None:
            with volume.open("r+b") as file:
                for _ in range(luck.randint(0, 6)):
                    file.seek(luck.randrange(SIZE // CHUNK) * CHUNK)
                    file.write(random.Random(luck.randrange(40)).randbytes(CHUNK))
            content = blake3(volume.read_bytes()).digest()
            outcome = self.start(luck, "backup", volume, "--json")
            lines = outcome.stdout.splitlines()
            if lines and b'"event": "done"' in lines[-1]:
                with self._lock:
                    self.contents[json.loads(lines[-1])["backups"][0]["id"]] = content

        return work

    def prune(self, luck: random.Random) -> None:
        """Give some backups up, then prune."""
        with self._lock:
            known = sorted(self.contents.keys() - self.given_up)
        if len(known) > 6:
            chosen = luck.sample(known, 3)
            # From the attempt on nothing is promised of them.
            with self._lock:
                self.given_up.update(chosen)
            self.start(luck, "forget", *chosen, "--force")
        self.start(luck, "prune")

    def check(self, luck: random.Random) -> None:
        outcome = self.start(luck, "check", *(["--read-data"] if luck.random() < 0.5 else []))
        assert outcome.code in {0, KILLED}, outcome

    def restore(self, luck: random.Random) -> None:
        """Restore what was reported done; what is given up meanwhile may be gone."""
        with self._lock:
            known = sorted(self.contents.keys() - self.given_up)
        if not known:
            time.sleep(0.2)
            return
        backup = luck.choice(known)
        outcome = self.start(luck, "restore", backup, "-")
        if outcome.code == 0:
            assert blake3(outcome.stdout).digest() == self.contents[backup]
        else:
            assert outcome.code == KILLED or backup in self.given_up, outcome

    def start(self, luck: random.Random, *arguments: str | Path) -> Outcome:
        """Run a command; in one case of four kill it somewhere."""
        process = self.command.start(*arguments)
        patience = luck.uniform(0.2, 2) if luck.random() < 0.25 else 300
        try:
            stdout, stderr = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        # Shut out twice, or the parent was given up meanwhile: the next run does it. Never damage.
        assert process.returncode != 13, (arguments, stderr)
        with self._lock:
            word = f"{arguments[0]} {process.returncode}"
            self.ends[word] = self.ends.get(word, 0) + 1
        return Outcome(process.returncode, stdout, stderr.decode())


def test_nothing_is_lost_whoever_is_killed(blocksnap: CommandLine, tmp_path: Path) -> None:
    household = Household(blocksnap, tmp_path)
    household.run()
    print(sorted(household.ends.items()), len(household.contents), len(household.given_up))
    blocksnap.done("backup", *sorted(tmp_path.glob("volume-*.img")))
    blocksnap.done("prune")
    blocksnap.done("check", "--read-data")
    listed = {each["id"] for each in blocksnap.done("list", "--json").document["backups"]}
    for backup, content in household.contents.items():
        if backup not in household.given_up:
            assert backup in listed
        if backup in listed:
            assert blake3(blocksnap.done("restore", backup, "-").stdout).digest() == content
    assert not list((tmp_path / "state" / "journal").iterdir())
