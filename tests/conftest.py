"""What holds for all tests."""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from blocksnap.repository import key_objects
from support.in_process import InProcess

_TOLD_LINES = 60
_CLEANING_SECONDS = 300.0

# A deadline makes a busy machine look like a broken program, and so does how long it takes to make examples.
settings.register_profile("blocksnap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("blocksnap")

# argon2id is made to take long, and gives the same for the same: tests open one repository many times.
key_objects.passphrase_key = functools.cache(key_objects.passphrase_key)


def _take_note_of(*_: object) -> None:
    """Nothing is done; but what is handled here is not ignored by the programs that tests start."""


# Under nohup, or in the background of a script, blocksnap would ignore them, as it should.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _take_note_of)


class _Teller:
    """Tells of a failure when it happens: the end, where pytest does, is not always reached."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()[-_TOLD_LINES:]
            self._terminal.write_line("\n".join(["", f"FAILED in {report.when}: {report.nodeid}", *lines]))
            self._terminal.flush()


class _Ender:
    """Ends the whole run where a test that has failed cannot be cleaned up after.

    pytest-timeout sets no limit any more once a test has failed, and a program that waits for a dead device
    cannot be killed: nobody would be told of anything. pytest's own plugin for faulthandler takes any timer
    back when something fails, so there are two: one for a test that was to be ended, and does not end, and
    one for what comes after it.
    """

    def __init__(self, stderr: int, limit_seconds: float) -> None:
        self._stderr = stderr
        self._limit_seconds = limit_seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._within_limit(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._within_limit(item))

    def _within_limit(self, item: pytest.Item) -> Generator[None, object, object]:
        marker = item.get_closest_marker("timeout")
        limit = float(marker.args[0]) if marker else self._limit_seconds
        # None is asked for by 0.
        if limit:
            faulthandler.dump_traceback_later(limit + _CLEANING_SECONDS, exit=True, file=self._stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Teller(terminal))
    asked = config.getoption("timeout")
    limit = config.getini("timeout") if asked is None else asked
    config.pluginmanager.register(_Ender(os.dup(2), float(limit)))


def shared_directories() -> dict[str, tuple[int, int, int, list[str]]]:
    """What describes the directories that all on this machine share, and those above them."""
    ends = [Path("/etc"), Path("/run"), Path("/var/tmp"), Path(tempfile.gettempdir())]  # noqa: S108
    described = {}
    for path in sorted({str(each) for end in ends for each in (end, *end.parents)}):
        info = os.stat(path)
        described[path] = (info.st_mode, info.st_uid, info.st_gid, sorted(os.listxattr(path)))
    return described


@pytest.fixture(autouse=True)
def _what_is_not_ours_stays() -> Iterator[None]:
    """Tests run as root: a random load that followed a symbolic link once closed /var to all others."""
    before = shared_directories()
    yield
    assert shared_directories() == before


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory."""
    return tmp_path / "state"


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    """A command line within the process of the test, without a repository."""
    return InProcess(tmp_path, monkeypatch, capsysbinary)


@pytest.fixture
def blocksnap(in_process: InProcess) -> InProcess:
    """The same with an empty repository, for tests that are not about encryption."""
    in_process.done("init", "--no-encryption")
    return in_process
