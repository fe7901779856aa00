"""Keep the allocator from giving memory back between chunks.

What decides throughput on ordinary servers is page faults on fresh allocations, not the algorithms
(docs/benchmarks.md): zstd's result for a chunk of 128 KiB is just large enough for glibc to map and
unmap it each time.
"""

from __future__ import annotations

_LARGEST = 32 << 20


def retain() -> None:
    """Raise glibc's thresholds for this process."""
    from blocksnap import _native

    _native.retain_memory(_LARGEST)
