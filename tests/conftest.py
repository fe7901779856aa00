"""What holds for all tests."""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from blocksnap.repository import key_objects
from support.in_process import InProcess

_TOLD_LINES = 60

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


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Teller(terminal))


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
