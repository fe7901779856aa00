# SPDX-License-Identifier: Apache-2.0
"""Programs that only remember how they were called.

``MockCommands`` puts a folder of them first on PATH, so that the real code runs and the exact
command line can be asserted without root. (The idea is osbuild's.)
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

_SCRIPT = """#!{python}
import json, os, sys
folder, name = {folder!r}, {name!r}
with open(os.path.join(folder, "calls"), "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answers = json.load(open(os.path.join(folder, name + ".json")))
turn = os.path.join(folder, name + ".turn")
number = int(open(turn).read()) if os.path.exists(turn) else 0
open(turn, "w").write(str(number + 1))
answer = answers[min(number, len(answers) - 1)]
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["status"])
"""


class MockCommands:
    """A folder of pretended programs; ``calls`` is what was run, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @property
    def path(self) -> str:
        """What PATH has to be."""
        return f"{self.folder}:{os.environ['PATH']}"

    @property
    def calls(self) -> list[list[str]]:
        """Every call so far: program and arguments."""
        try:
            text = (self.folder / "calls").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def calls_of(self, program: str) -> list[list[str]]:
        """The arguments of every call of one program."""
        return [call[1:] for call in self.calls if call[0] == program]

    def add(self, program: str, out: str = "", err: str = "", status: int = 0) -> None:
        """Pretend a program that always answers the same."""
        self.add_sequence(program, [(out, err, status)])

    def add_sequence(self, program: str, answers: list[tuple[str, str, int]]) -> None:
        """Pretend a program that gives these (output, errors, status) in turn, the last one for ever."""
        named = [{"out": out, "err": err, "status": status} for out, err, status in answers]
        (self.folder / f"{program}.json").write_text(json.dumps(named))
        (self.folder / f"{program}.turn").unlink(missing_ok=True)
        script = self.folder / program
        script.write_text(_SCRIPT.format(python=sys.executable, folder=str(self.folder), name=program))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
