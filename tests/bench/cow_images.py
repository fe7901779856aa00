"""Write an exception store for the benchmark: python cow_images.py EXCEPTIONS ORIGIN_CHUNKS PATH.

Chunks of 4 KiB, in an order in which hardly any two neighbours follow each other. What the kernel would have
copied is left out: nobody reads it, so the file has holes there. With one exception each time, as a full area
is followed by an empty one.
"""

import os
import struct
import sys
from pathlib import Path

CHUNK_SIZE = 4096
PER_AREA = CHUNK_SIZE // 16
STEP = 1_000_003


def main() -> None:
    count, origin_chunks, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    assert origin_chunks % STEP, "the step would come back to where it began"
    unfinished = path.with_suffix(".part")
    areas = count // PER_AREA + 1
    with unfinished.open("wb") as file:
        file.truncate((1 + areas * (PER_AREA + 1)) * CHUNK_SIZE)
        file.write(struct.pack("<4I", int.from_bytes(b"SnAp", "little"), 1, 1, CHUNK_SIZE // 512))
        for area in range(areas):
            chunk = 1 + area * (PER_AREA + 1)
            first = area * PER_AREA
            pairs = []
            for slot in range(min(PER_AREA, count - first)):
                pairs += [(first + slot) * STEP % origin_chunks, chunk + 1 + slot]
            file.seek(chunk * CHUNK_SIZE)
            file.write(struct.pack(f"<{len(pairs)}Q", *pairs).ljust(CHUNK_SIZE, b"\0"))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


if __name__ == "__main__":
    main()
