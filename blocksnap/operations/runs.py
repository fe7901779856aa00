"""This process as the author of a run, and whether the author of another one still lives."""

from __future__ import annotations

import os

from blocksnap.repository.documents import WriterRecord
from blocksnap.repository.writer import Author
from blocksnap.system.host import boot_id, host_id, host_name, process_start


def this_author() -> Author:
    """Return who this process is."""
    pid = os.getpid()
    return Author(host_id(), host_name(), pid, boot_id(), process_start(pid) or 0)


def is_gone(record: WriterRecord) -> bool:
    """Tell whether the process that wrote a record has ended; only of this host's own is that known."""
    if record.host != host_id() or not record.boot:
        return False
    return record.boot != boot_id() or process_start(record.pid) != record.started
