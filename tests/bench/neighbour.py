"""What a backup does to a database that is at work on the same disk, by the policies of pace.

A PostgreSQL of its own runs pgbench for a while without a backup, and then with one after the other of: as
fast as it goes, gentle, fixed. What is backed up is an image file on the same file system (or a volume that
is named), in full each time, again and again while pgbench runs, with dropped caches. The table has
transactions a second, latency, and how fast the backup was. For a quiet machine whose disk is the bottleneck.

    make bench-neighbour
    .venv/bin/python tests/bench/neighbour.py --folder /srv/bench --volume vg0/data --seconds 60
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.databases import as_postgres

POLICIES = {
    "none": "",
    "off": 'policy = "off"\n',
    "gentle": 'policy = "gentle"\n',
    "fixed": 'policy = "fixed"\nread_rate = "20M"\n',
}
_BLOCK = 1 << 20


def run(*words: str | Path, check: bool = True) -> None:
    """Run a program as the server's user."""
    done = subprocess.run(as_postgres(*words), check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}")


def programs() -> Path:
    """Return the folder with initdb, pg_ctl and pgbench."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    if not found:
        raise SystemExit("pgbench is not installed: apt install postgresql")
    return found[-1].parent


@contextmanager
def database(folder: Path, scale: int) -> Iterator[tuple[Path, str]]:
    """Run a server with the tables of pgbench; yield its folder of programs and its socket's."""
    binaries, data = programs(), folder / "data"
    data.mkdir()
    shutil.chown(folder, "postgres")
    shutil.chown(data, "postgres")
    run(binaries / "initdb", "-D", data, "--auth", "trust")
    # Little memory, so that pages come from the disk.
    options = f"-k {folder} -c listen_addresses='' -c shared_buffers=32MB -c max_wal_size=256MB"
    words = (binaries / "pg_ctl", "-D", data, "-l", folder / "log", "-o", options, "-w")
    run(*words, "start")
    try:
        run(binaries / "pgbench", "-h", folder, "-U", "postgres", "-i", "-q", "-s", str(scale), "postgres")
        yield binaries, str(folder)
    finally:
        run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop", check=False)


def make_image(path: Path, size: int) -> None:
    """Write an image of bytes that do not compress."""
    with path.open("wb") as file:
        for _ in range(size // _BLOCK):
            file.write(os.urandom(_BLOCK))
        os.fsync(file.fileno())


class Backups:
    """Backs a volume up in full, again and again, until it is told to stop."""

    def __init__(self, folder: Path, volume: str, pace: str) -> None:
        configuration = folder / "bench.toml"
        configuration.write_text(f"[defaults.pace]\n{pace}")
        repository = folder / "repository"
        shutil.rmtree(repository, ignore_errors=True)
        self._words = [sys.executable, "-m", "blocksnap"]
        self._tail = ["--repo", str(repository), "--config", str(configuration)]
        self._environment = {
            **os.environ,
            "BLOCKSNAP_STATE_DIRECTORY": str(folder / "state"),
            "BLOCKSNAP_CACHE": str(folder / "cache"),
        }
        self._call("init", "--no-encryption")
        self._volume = volume

    def _call(self, *words: str) -> str:
        argv = [*self._words, *words, *self._tail]
        return subprocess.run(argv, check=True, capture_output=True, text=True, env=self._environment).stdout

    def run_beside(self, process: subprocess.Popen[str]) -> tuple[int, float]:
        """Back up until the process ends; return the bytes that were read, and the seconds that took."""
        read, began = 0, time.monotonic()
        while process.poll() is None:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            argv = [*self._words, "backup", self._volume, "--full", "--json", *self._tail]
            with subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment
            ) as backup:
                while backup.poll() is None and process.poll() is None:
                    time.sleep(0.05)
                ended = time.monotonic()
                if backup.poll() is None:
                    backup.send_signal(signal.SIGTERM)
                out = backup.communicate()[0]
            events = [json.loads(line) for line in out.splitlines()]
            done = [event for event in events if event["event"] == "done"]
            progress = [event["done_bytes"] for event in events if event["event"] == "progress"]
            read += done[0]["backups"][0]["read_bytes"] if done else max(progress, default=0)
        return read, ended - began


def measure(binaries: Path, socket: str, seconds: int, backups: Backups | None) -> dict[str, float]:
    """Run pgbench, with backups beside it if there are any."""
    words = ["-h", socket, "-U", "postgres", "-c", "4", "-j", "1", "-T", str(seconds), "-l", "postgres"]
    with tempfile.TemporaryDirectory() as logs:
        argv = [str(binaries / "pgbench"), *words]
        with subprocess.Popen(
            argv, cwd=logs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            read, took = backups.run_beside(process) if backups else (0, 1.0)
            said = process.communicate()[0]
        latencies = sorted(
            int(line.split()[2]) for path in Path(logs).glob("pgbench_log.*") for line in path.open()
        )
    tps = re.search(r"tps = ([0-9.]+)", said)
    return {
        "tps": float(tps[1]) if tps else 0.0,
        "median_ms": latencies[len(latencies) // 2] / 1000,
        "p99_ms": latencies[len(latencies) * 99 // 100] / 1000,
        "worst_ms": latencies[-1] / 1000,
        "backup_mib_s": read / took / (1 << 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where database, image and repository lie; a scratch one")
    parser.add_argument("--volume", help="what is backed up, instead of an image file")
    parser.add_argument("--image-mib", type=int, default=4096)
    parser.add_argument("--scale", type=int, default=100, help="of pgbench: 16 MiB each")
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    if os.geteuid():
        raise SystemExit("run it as root: it drops caches, and the server runs as postgres")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="neighbour-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        volume = arguments.volume or str(folder / "image")
        if not arguments.volume:
            make_image(folder / "image", arguments.image_mib << 20)
        server = folder / "server"
        server.mkdir()
        with database(server, arguments.scale) as (binaries, socket):
            header = ("policy", "tps", "median_ms", "p99_ms", "worst_ms", "backup_mib_s")
            print("  ".join(f"{word:>12}" for word in header))
            for policy, pace in POLICIES.items():
                backups = Backups(folder, volume, pace) if policy != "none" else None
                seen = measure(binaries, socket, arguments.seconds, backups)
                print(f"{policy:>12}  " + "  ".join(f"{value:12.1f}" for value in seen.values()), flush=True)


if __name__ == "__main__":
    main()
