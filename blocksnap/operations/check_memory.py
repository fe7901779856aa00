"""What this host remembers of the packs it has read: where the repository takes no results, this is all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from blocksnap.repository.checked import merge_states
from blocksnap.repository.documents import Checked
from blocksnap.repository.scrubbing import PackState

_FOLDER = "checks"


class CheckMemory:
    """A file of the state directory, one for each repository; losing it costs reading packs again."""

    def __init__(self, state_directory: str, repository_id: str) -> None:
        self._path = Path(state_directory) / _FOLDER / repository_id
        self.states = _load(self._path)

    def merged_with(self, others: Mapping[str, PackState]) -> dict[str, PackState]:
        """Return what is known here and elsewhere: the later look counts, and bad until found good since."""
        return {
            name: _later(self.states.get(name, PackState()), others.get(name, PackState()))
            for name in self.states.keys() | others.keys()
        }

    def note(self, documents: Iterable[Checked]) -> None:
        """Write down what was read. A state directory that cannot be written to is done without."""
        self.states = merge_states(self.states, documents)
        text = json.dumps(
            {
                name: [_text(state.hashed), _text(state.opened), state.is_bad]
                for name, state in self.states.items()
            }
        )
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = self._path.with_suffix(".new")
            beside.write_text(text)
            beside.replace(self._path)

    def keep_only(self, packs: Iterable[str]) -> None:
        """Forget packs that are not there any more."""
        kept = set(packs)
        self.states = {name: state for name, state in self.states.items() if name in kept}


def _later(one: PackState, other: PackState) -> PackState:
    def latest(*times: datetime | None) -> datetime | None:
        return max(filter(None, times), default=None)

    return PackState(
        latest(one.hashed, other.hashed), latest(one.opened, other.opened), one.is_bad or other.is_bad
    )


def _text(time: datetime | None) -> str | None:
    return time.isoformat() if time else None


def _load(path: Path) -> dict[str, PackState]:
    try:
        document = json.loads(path.read_bytes())
        return {
            name: PackState(
                datetime.fromisoformat(hashed) if hashed else None,
                datetime.fromisoformat(opened) if opened else None,
                bool(bad),
            )
            for name, (hashed, opened, bad) in document.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
