"""The extension as a whole: nothing leaks, signals get through, the stub tells the truth."""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from blocksnap import _native
from support import send_stream
from support.cow_store import CowStore
from support.require import require
from support.thin_metadata import Run, restore

STUB = Path(inspect.getsourcefile(restore) or "").parents[2] / "blocksnap" / "_native.pyi"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    require("lvm", shutil.which("thin_restore") is not None, "thin-provisioning-tools is not installed")
    path = tmp_path_factory.mktemp("leaks") / "meta"
    runs = [Run(n * 2, 1, n, n % 4) for n in range(2000)]
    restore(path, {1: runs, 3: [Run(n * 3, 1, 3000 + n, 3) for n in range(900)]}, time=3)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def fails(expected: type[BaseException], call: Callable[[], object]) -> None:
    with contextlib.suppress(expected):
        call()
        pytest.fail("did not fail")


@cache
def store() -> int:
    """A descriptor of an exception store, in memory, for as long as the tests run."""
    fd = os.memfd_create("store")
    CowStore([n * 7 % 3989 for n in range(900)]).write(fd)
    return fd


FIEMAP_RECORDS = b"".join(struct.pack("<QQQ16xI12x", n << 13, n << 12, 4096, 0) for n in range(100))
NUMBERS = (257).to_bytes(8, "little")
STREAM = bytes(send_stream.Writer(2).everything())

# Every exported function, on its good ways and on its bad ones.
LOOPS: dict[str, list[Callable[[int], object]]] = {
    "act_as": [
        lambda _: _native.act_as(os.geteuid()),
        lambda _: fails(OSError, lambda: _native.act_as((1 << 32) - 1)),
        lambda _: fails(OverflowError, lambda: _native.act_as(-1)),
    ],
    "thin_device": [
        lambda fd: _native.thin_device(fd, 1, 0),
        lambda fd: fails(KeyError, lambda: _native.thin_device(fd, 2, 0)),
        lambda _: fails(OSError, lambda: _native.thin_device(-1, 1, 0)),
    ],
    "thin_scan": [
        lambda fd: _native.thin_scan(fd, 1, 0, 0, 5000, False, 0),
        lambda fd: _native.thin_scan(fd, 1, 2, 0, 5000, False, 0),
        lambda fd: fails(ValueError, lambda: _native.thin_scan(fd, 1, 9, 0, 5000, False, 0)),
        lambda fd: fails(KeyError, lambda: _native.thin_scan(fd, 2, 1, 0, 5000, False, 0)),
        lambda _: fails(OSError, lambda: _native.thin_scan(-1, 1, 1, 0, 5000, False, 0)),
        lambda fd: fails(OverflowError, lambda: _native.thin_scan(fd, 1, 1, 0, -1, False, 0)),
    ],
    "thin_diff": [
        lambda fd: _native.thin_diff(fd, 1, 3, 0, 5000, 0),
        lambda fd: _native.thin_diff(fd, _native.THIN_NO_DEVICE, 1, 0, 5000, 0),
        lambda fd: fails(KeyError, lambda: _native.thin_diff(fd, 2, 1, 0, 5000, 0)),
        lambda fd: fails(ValueError, lambda: _native.thin_diff(fd, 1, 3, 0, 1 << 60, 0)),
        lambda fd: fails(ValueError, lambda: _native.thin_diff(fd, 1, 3, 0, 5000, 7)),
        lambda _: fails(OSError, lambda: _native.thin_diff(-1, 1, 3, 0, 5000, 0)),
    ],
    "bitmap_extents": [
        lambda _: _native.bitmap_extents(b"\x55" * 5000, 4096),
        lambda _: fails(OverflowError, lambda: _native.bitmap_extents(b"\x55" * 5000, 1 << 60)),
        lambda _: fails(ValueError, lambda: _native.bitmap_extents(bytes(5000), 0)),
    ],
    "bitmap_subtract": [
        lambda _: _native.bitmap_subtract(bytes(5000), bytes(4000)),
        lambda _: fails(TypeError, lambda: _native.bitmap_subtract(bytes(5000), 5)),  # type: ignore[arg-type]
    ],
    "bitmap_update": [
        lambda _: _native.bitmap_update(bytes(5000), 50000, 4096, bytes(16), bytes(32)),
        lambda _: fails(ValueError, lambda: _native.bitmap_update(b"", 8, 0, b"", b"")),
        lambda _: fails(ValueError, lambda: _native.bitmap_update(b"", 8, 1, b"short", b"")),
        lambda _: fails(OverflowError, lambda: _native.bitmap_update(b"", 8, 1, b"\xff" * 16, b"")),
    ],
    "data_extents": [
        lambda fd: _native.data_extents(fd, 0, 1 << 30),
        lambda _: fails(OSError, lambda: _native.data_extents(-1, 0, 1)),
    ],
    "btrfs_diff": [
        lambda fd: _native.btrfs_diff(fd, -1, b"", b"", 4096, True, 1),
        lambda fd: fails(OSError, lambda: _native.btrfs_diff(fd, fd, NUMBERS, b"", 4096, False, 1)),
        lambda fd: fails(ValueError, lambda: _native.btrfs_diff(fd, -1, bytes(8), b"", 4096, True, 1)),
        lambda fd: fails(ValueError, lambda: _native.btrfs_diff(fd, -1, NUMBERS, b"", 4097, True, 1)),
        lambda fd: fails(ValueError, lambda: _native.btrfs_diff(fd, -1, b"short", b"", 4096, True, 1)),
    ],
    "btrfs_diff_file": [
        lambda fd: fails(OSError, lambda: _native.btrfs_diff_file(fd, 257, fd, 257, 4096)),
        lambda fd: fails(ValueError, lambda: _native.btrfs_diff_file(fd, 257, fd, 257, 0)),
    ],
    "btrfs_send": [
        lambda fd: fails(OSError, lambda: _native.btrfs_send(fd, 0, 1)),
        lambda _: fails(OSError, lambda: _native.btrfs_send(-1, 5, 2)),
        lambda _: fails(OverflowError, lambda: _native.btrfs_send(0, 5, -1)),
    ],
    "btrfs_send_steps": [
        lambda _: _native.btrfs_send_steps(STREAM),
        lambda _: fails(ValueError, lambda: _native.btrfs_send_steps(STREAM[:-5])),
        lambda _: fails(ValueError, lambda: _native.btrfs_send_steps(STREAM + b"x")),
        lambda _: fails(TypeError, lambda: _native.btrfs_send_steps(7)),  # type: ignore[arg-type]
    ],
    "btrfs_touched": [
        lambda fd: fails(OSError, lambda: _native.btrfs_touched(fd, 0)),
        lambda _: fails(OverflowError, lambda: _native.btrfs_touched(-1, -1)),
    ],
    "compare_files": [
        lambda fd: _native.compare_files(fd, fd, 4096),
        lambda fd: fails(ValueError, lambda: _native.compare_files(fd, fd, 5)),
        lambda fd: fails(OSError, lambda: _native.compare_files(fd, -1, 4096)),
        lambda fd: fails(OverflowError, lambda: _native.compare_files(fd, fd, -1)),
    ],
    "cow_scan": [
        lambda _: _native.cow_scan(store(), 0, 0),
        lambda _: _native.cow_scan(store(), 4000 * 4096, 3),
        lambda _: fails(ValueError, lambda: _native.cow_scan(store(), 4096, 0)),
        lambda _: fails(ValueError, lambda: _native.cow_scan(store(), 1 << 63, 0)),
        lambda fd: fails(ValueError, lambda: _native.cow_scan(fd, 0, 0)),
        lambda _: fails(OSError, lambda: _native.cow_scan(-1, 0, 0)),
        lambda _: fails(OverflowError, lambda: _native.cow_scan(0, -1, 0)),
    ],
    "fiemap_diff": [
        lambda fd: fails(ValueError, lambda: _native.fiemap_diff(fd, fd)),
        lambda fd: fails(OSError, lambda: _native.fiemap_diff(-1, fd)),
    ],
    "fiemap_diff_records": [
        lambda _: _native.fiemap_diff_records(FIEMAP_RECORDS, 1 << 20, b"", 1 << 20, 3),
        lambda _: _native.fiemap_diff_records(b"", 1 << 20, FIEMAP_RECORDS, 1 << 20, 3),
        lambda _: fails(ValueError, lambda: _native.fiemap_diff_records(bytes(56), 1, b"", 1, 1)),
        lambda _: fails(OverflowError, lambda: _native.fiemap_diff_records(b"", -1, b"", 1, 1)),
        lambda _: fails(TypeError, lambda: _native.fiemap_diff_records(b"", 1, None, 1, 1)),  # type: ignore[arg-type]
    ],
    "retain_memory": [lambda _: _native.retain_memory(1 << 20)],
}


def exported_functions() -> set[str]:
    return {name for name in dir(_native) if callable(getattr(_native, name)) and not name.startswith("_")}


def test_every_function_is_in_the_leak_loop() -> None:
    assert set(LOOPS) == exported_functions()


def resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps freed memory on purpose"
)
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_nothing_leaks(name: str, image: int) -> None:
    def repeat(times: int) -> None:
        for _ in range(times):
            for call in LOOPS[name]:
                call(image)

    repeat(300)
    # What tests before this one left to the collector holds descriptors too.
    gc.collect()
    descriptors, before = open_descriptors(), resident_kib()
    repeat(1500)
    # The smallest thing a call could lose is an object of some 50 bytes: 1500 of the results are MiBs.
    assert resident_kib() - before < 512
    assert open_descriptors() == descriptors


def test_no_reference_is_lost(image: int) -> None:
    """Arguments come back with as many references as they went."""
    bitmap, number = bytes(64), 10**5
    before = sys.getrefcount(bitmap), sys.getrefcount(number)
    for _ in range(100):
        _native.bitmap_extents(bitmap, number)
        _native.bitmap_subtract(bitmap, bitmap)
        fails(ValueError, lambda: _native.thin_scan(image, 1, number, 0, number, False, 0))
    assert (sys.getrefcount(bitmap), sys.getrefcount(number)) == before


def test_the_stub_lists_what_there_is() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == exported_functions()
    assert all(ast.get_docstring(function) for function in functions.values())
    for name, function in functions.items():
        # All arguments are positional, and a wrong number of them is refused.
        count = len(function.args.posonlyargs)
        assert not function.args.args
        with pytest.raises(TypeError, match=name):
            getattr(_native, name)(*[0] * (count + 1))
    assert _native.THIN_BLOCK_SIZE == 4096


def test_retain_memory_refuses_nonsense() -> None:
    _native.retain_memory(0)
    _native.retain_memory((1 << 64) - 1)
    with pytest.raises(OverflowError):
        _native.retain_memory(-1)
    _native.retain_memory(1 << 20)


def test_scans_run_in_threads(image: int) -> None:
    expected = _native.thin_scan(image, 1, 2, 0, 5000, False, 0)
    answers: list[object] = []

    def work() -> None:
        answers.extend(_native.thin_scan(image, 1, 2, 0, 5000, False, 0) == expected for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 200


def test_a_signal_stops_a_long_scan(tmp_path: Path) -> None:
    """A file with very many holes takes a while; the handler's exception ends the walk early."""
    path = tmp_path / "holes"
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from blocksnap import _native

        def stop(*_):
            raise InterruptedError("stopped")

        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 1 << 33)
        for n in range(30000):
            os.pwrite(fd, b"x", n << 17)
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            while True:
                begin = time.monotonic()
                _native.data_extents(fd, 0, 1 << 33)
                whole = time.monotonic() - begin
        except InterruptedError:
            print("stopped")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("stopped\n", 0), done.stderr


def test_default_signal_handling_is_left_alone() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
