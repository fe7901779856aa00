# SPDX-License-Identifier: Apache-2.0
"""The classic experiment of hot backup: `make demo`.

A database lives on a logical volume, and a program writes to it without a pause. Meanwhile blocksnap backs
the volume up three times. Then the volume is destroyed, the first and the last backup are restored, and each
must hold every transaction that was acknowledged before its snapshot and none that was sent after it.

Ends with 0 and the line `all committed rows are present`, or with 1 and what went wrong. Takes the disks in
LAB_DISKS for itself and needs root; what it made is gone afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ledger
import storage
from commands import DemoError
from databases import Database, Postgres, open_database
from journal import pace, read_journal
from judge import Verdict, judge
from product import Backup, Blocksnap
from table import HEADER, Line, format_table, mebibytes

VOLUME = "database"
# Long enough for a checkpoint of the database, so that more than its log changes between two backups.
QUIET_SECONDS = (4.0, 8.0, 8.0)
FINDINGS_SHOWN = 10
LEGEND = """\
freeze         how long blocksnap saw the volume suspended
longest stall  the program's slowest transaction while the command ran; both share one CPU in the lab
(quiet)        the same just before, without a backup"""
STARTED = time.monotonic()


def say(text: str) -> None:
    """Tell the story, with the seconds since it began."""
    print(f"[{time.monotonic() - STARTED:5.1f}] {text}", flush=True)


class Workload:
    """The program that writes to the database, as a process of its own."""

    def __init__(self, directory: Path, run_directory: Path, *, sqlite: bool) -> None:
        self.journal = run_directory / "journal"
        program = Path(__file__).with_name("workload.py")
        options = ["--sqlite"] if sqlite else []
        self._process = subprocess.Popen(
            [sys.executable, program, directory, run_directory, self.journal, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Return when the table is filled and the program works at its normal pace."""
        if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
            raise DemoError(f"the program could not start: {self._said()}")

    def check(self) -> None:
        """Raise DemoError if the program has ended, as it does when a transaction was refused."""
        if self._process.poll() is not None:
            raise DemoError(f"the program ended while the database was backed up: {self._said()}")

    def stop(self) -> None:
        """Let the program finish its transactions and end."""
        self.check()
        self._process.send_signal(signal.SIGTERM)
        said = self._said()
        if self._process.returncode:
            raise DemoError(f"the program failed at the end: {said}")

    def kill(self) -> None:
        """End the program if it still runs."""
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        return self._process.communicate(timeout=60)[1].strip()


@contextmanager
def run_directory() -> Iterator[Path]:
    """A directory in memory for sockets, logs and the journal, open to other users."""
    path = Path(tempfile.mkdtemp(prefix="blocksnap-demo-", dir="/run"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def prepare(stack: ExitStack, directory: Path, *, sqlite: bool) -> tuple[Database, Path, ExitStack]:
    """Build the volumes and start the database; return it, the repository's place, and the mount."""
    group_disk, repository_disk = storage.scratch_disks()
    stack.enter_context(storage.volume_group(group_disk))
    storage.create_volume(VOLUME)
    mount = stack.enter_context(storage.mounted(storage.device_of(VOLUME), directory / "live"))
    storage.make_filesystem(repository_disk)
    stack.enter_context(storage.mounted(repository_disk, directory / "backup"))
    say(f"a thin volume {storage.GROUP}/{VOLUME} of {storage.VOLUME_SIZE} with ext4, and a second disk")
    database = open_database(directory / "live", directory, sqlite=sqlite)
    if not isinstance(database, Postgres):
        say(f"{'as asked' if sqlite else 'PostgreSQL is not installed, so'} SQLite takes its place")
    stack.callback(database.kill)
    database.create()
    say(f"{database.name} on it, fsync on")
    return database, directory / "backup" / "repository", mount


def take_backups(blocksnap: Blocksnap, workload: Workload) -> list[Line]:
    """Take all backups while the program works, telling of each."""
    lines = []
    for number, quiet_seconds in enumerate(QUIET_SECONDS):
        quiet_began = time.time()
        time.sleep(quiet_seconds)
        backup = blocksnap.back_up(f"{storage.GROUP}/{VOLUME}")
        workload.check()
        if (backup.kind == "full") != (number == 0):
            raise DemoError(f"backup {number + 1} is {backup.kind}: {backup.reason}")
        transactions = read_journal(workload.journal)
        line = Line(
            backup,
            pace(transactions, backup.began, backup.ended),
            pace(transactions, quiet_began, backup.began),
        )
        tell_backup(line)
        lines.append(line)
    return lines


def tell_backup(line: Line) -> None:
    """Say what one backup did, and what the program noticed of it."""
    backup = line.backup
    say(f"backup {backup.id[:8]}, {backup.kind}, {backup.method} ({backup.reason}):")
    say(
        f"    read {mebibytes(backup.read_bytes)} of {mebibytes(backup.volume_bytes)}, "
        f"stored {mebibytes(backup.stored_bytes)}, took {backup.seconds:.1f} s "
        f"({backup.ended - backup.began:.1f} s with start-up)"
    )
    since_snapshot = line.during.stalled_at - backup.time
    when = f"{abs(since_snapshot):.1f} s {'before' if since_snapshot < 0 else 'after'} the snapshot"
    say(
        f"    froze for {backup.freeze_ms:.0f} ms; the program's longest stall, begun {when}, was "
        f"{line.during.longest_stall_ms:.0f} ms; {line.quiet.longest_stall_ms:.0f} ms without a backup"
    )


@dataclass(frozen=True, slots=True)
class Proof:
    """What it takes to restore a backup and to judge it."""

    blocksnap: Blocksnap
    directory: Path
    journal: Path
    sqlite: bool
    restored: list[str] = field(default_factory=list)

    def restore(self, backup: str, taken: Backup, *, not_taken: Backup) -> None:
        """Restore to a new volume and judge its database; raises DemoError if a promise was broken.

        Measured by the instant of ``not_taken``, another backup, the same rows must fail: so much for a judge
        that finds no fault with anything.
        """
        name = f"restored_{taken.id[:8]}"
        self.restored.append(name)
        seconds = self.blocksnap.restore(backup, f"{storage.GROUP}/{name}")
        say(f"restored {backup} to a new volume and read it back in {seconds:.1f} s")
        mount_point = self.directory / name
        storage.check_filesystem(storage.device_of(name), mount_point)
        say("    the filesystem replayed its journal, and e2fsck finds no fault")
        with storage.mounted(storage.device_of(name), mount_point), ExitStack() as stack:
            database = open_database(mount_point, self.directory, sqlite=self.sqlite)
            stack.callback(database.kill)
            self.judge(database, taken, not_taken)

    def restore_instantly(self, backup: str, taken: Backup, *, not_taken: Backup) -> None:
        """Restore the destroyed volume under its own name, and use the database before all of it is there."""
        restore = self.blocksnap.restore_instantly(backup, f"{storage.GROUP}/{VOLUME}")
        with ExitStack() as stack:
            stack.callback(restore.kill)
            after = f"can be used after {restore.seconds:.1f} s"
            say(f"restore {backup} --instant: {storage.GROUP}/{VOLUME} {after}")
            mount_point = self.directory / "instant"
            stack.enter_context(storage.mounted(storage.device_of(VOLUME), mount_point))
            database = open_database(mount_point, self.directory, sqlite=self.sqlite)
            stack.callback(database.kill)
            began = time.monotonic()
            said = database.start()
            count = len(database.bodies())
            arrived = storage.arrived_share(VOLUME)
            if not restore.is_at_work or arrived >= 1:
                raise DemoError("all of it had arrived before the database was asked: nothing was shown")
            say(f"    the database: {said}")
            say(
                f"    it read {count} rows {time.monotonic() - began:.1f} s after the mount, "
                f"with {arrived:.0%} of the volume there"
            )
            database.kill()
            self.judge(database, taken, not_taken)
            seconds = restore.finish()
            say(f"    all of it was there and merged after {seconds:.1f} s, under the mounted filesystem")
            if (left := storage.volumes()) != sorted([VOLUME, *self.restored]):
                raise DemoError(f"the restore left something in the volume group: {left}")
        storage.check_filesystem(storage.device_of(VOLUME), self.directory / "instant")
        say("    the filesystem replayed its journal, and e2fsck finds no fault")

    def judge(self, database: Database, taken: Backup, not_taken: Backup) -> None:
        """Start a restored database, compare it with the journal, and let it check itself."""
        said = database.start()
        if not said:
            raise DemoError("the database did not notice that it was torn out of its work")
        say(f"    the database: {said}")
        transactions, rows = read_journal(self.journal), ledger.seeds_of(database.bodies())
        verdicts = [
            judge(transactions, rows, before=each.certain_before, after=each.certain_after)
            for each in (taken, not_taken)
        ]
        if not taken.freeze_ms:
            say("    (its freeze was too short to be seen: the instant is somewhere within the command)")
        tell_verdict(verdicts[0])
        if verdicts[1].kept:
            raise DemoError("the judge cannot tell two backups apart: nothing was shown")
        say(
            f"    (by the time of backup {not_taken.id[:8]}, {len(verdicts[1].findings)} rows would be wrong)"
        )
        say(f"    sound: {', '.join(database.check())}")


def tell_verdict(verdict: Verdict) -> None:
    """Say what the judge found; raises DemoError unless every promise was kept."""
    if not verdict.kept:
        shown = [f"    {finding}" for finding in verdict.findings[:FINDINGS_SHOWN]]
        raise DemoError("\n".join([f"{len(verdict.findings)} promises were broken:", *shown]))
    if not verdict.acknowledged or not verdict.later:
        raise DemoError("the program did nothing before or after the snapshot: nothing was shown")
    say(f"    all {verdict.acknowledged} transactions committed before the snapshot are there, whole")
    say(
        f"    of {verdict.under_way} under way at that instant, {verdict.under_way_kept} are there; "
        f"of {verdict.later} sent later, none"
    )
    say(f"    {verdict.rows} rows hold what was last written; {verdict.deleted_rows} deleted ones are gone")


def destroy(blocksnap: Blocksnap, backups: list[Backup]) -> None:
    """Remove the volume, once it is certain that nothing of it is left in the group."""
    if (left := storage.volumes()) != [VOLUME]:
        raise DemoError(f"backups left something in the volume group: {left}")
    storage.remove_volume(VOLUME)
    say(f"the program has stopped, and {storage.GROUP}/{VOLUME} is destroyed: lvremove")
    if (listed := blocksnap.listed()) != [backup.id for backup in backups]:
        raise DemoError(f"the repository lists other backups than were taken: {listed}")


def tell_story(stack: ExitStack, *, sqlite: bool) -> list[Line]:
    """Do everything; return what the table shows."""
    directory = stack.enter_context(run_directory())
    database, repository, mount = prepare(stack, directory, sqlite=sqlite)
    workload = Workload(directory / "live", directory, sqlite=sqlite)
    stack.callback(workload.kill)
    blocksnap = Blocksnap(repository, directory)
    blocksnap.init()
    workload.wait_until_ready()
    say(f"a program with {database.clients} client(s) inserts, updates and deletes all the time")
    lines = take_backups(blocksnap, workload)
    backups = [line.backup for line in lines]
    time.sleep(1)  # some transactions that no backup may hold
    workload.stop()
    database.kill()
    mount.close()
    destroy(blocksnap, backups)
    for backup in backups[1:-1]:
        blocksnap.verify(backup.id)
        say(f"backup {backup.id[:8]} can be read to its last chunk")
    proof = Proof(blocksnap, directory, workload.journal, sqlite)
    first, last = backups[0], backups[-1]
    proof.restore(f"{storage.GROUP}/{VOLUME}@latest", last, not_taken=first)
    proof.restore(first.id[:8], first, not_taken=last)
    proof.restore_instantly(last.id[:8], last, not_taken=first)
    return lines


def failures_of(err: DemoError) -> list[str]:
    """Return what went wrong, and after it what went wrong while cleaning up."""
    failures = [str(err)]
    before = err.__context__
    while before is not None:
        if isinstance(before, DemoError):
            failures.insert(0, str(before))
        before = before.__context__
    return failures


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sqlite", action="store_true", help="use SQLite although PostgreSQL is installed")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with ExitStack() as stack:
            lines = tell_story(stack, sqlite=arguments.sqlite)
    except DemoError as err:
        for failure in failures_of(err):
            say(f"FAILED: {failure}")
        return 1
    print()
    print(format_table(HEADER, [line.cells() for line in lines]))
    print(LEGEND)
    print()
    say("all committed rows are present")
    return 0


if __name__ == "__main__":
    sys.exit(main())
