"""Read an exception store in plain Python, as a script for the purpose would: python cow_reader.py PATH.

Reads the areas with O_DIRECT, sorts the chunks, merges neighbours, and prints how many extents there are.
"""

import mmap
import os
import struct
import sys


def main() -> None:
    fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    os.preadv(fd, [memoryview(buffer)[:4096]], 0)
    chunk_size = struct.unpack_from("<4I", buffer)[3] * 512
    per_area = chunk_size // 16
    chunks: list[int] = []
    area, full = 0, True
    while full:
        os.preadv(fd, [memoryview(buffer)[:chunk_size]], (1 + area * (per_area + 1)) * chunk_size)
        for old, new in struct.iter_unpack("<QQ", memoryview(buffer)[:chunk_size]):
            if new == 0:
                full = False
                break
            chunks.append(old)
        area += 1
    chunks.sort()
    extents: list[tuple[int, int]] = []
    begin = end = -1
    for chunk in chunks:
        if chunk != end:
            if begin >= 0:
                extents.append((begin * chunk_size, (end - begin) * chunk_size))
            begin = chunk
        end = chunk + 1
    if begin >= 0:
        extents.append((begin * chunk_size, (end - begin) * chunk_size))
    print(len(extents))


if __name__ == "__main__":
    main()
