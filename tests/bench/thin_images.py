"""Build an image of thin-pool metadata to measure: thin_images.py CHUNKS CLUSTERED SCATTERED FEW PATH.

Device 1 maps CHUNKS chunks of 64 KiB that lie anywhere on the pool, in leaves that lie anywhere in the
metadata, as after years of random writes. Device 2 is its snapshot, device 3 one taken after CLUSTERED chunks
were written in clusters of 64, device 4 after SCATTERED single ones, device 5 after FEW, and device 6 is the
same as 5.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.thin_builder import ThinBuilder

CLUSTER = 64
PER_LEAF = 170


def build(chunks: int, clustered: int, scattered: int, few: int, path: Path) -> None:
    """Write the image; it appears under its name when it is complete."""
    chance = random.Random(chunks)
    changes = clustered + scattered + few
    blocks = 4096 + chunks // PER_LEAF * 5 // 4 + 4 * changes
    unfinished = path.with_suffix(".new")
    with ThinBuilder(unfinished, blocks=blocks, data_blocks=chunks + chunks // 100 + changes) as pool:
        pool.create_thin(1)
        pool.fill(1, range(chunks), per_leaf=PER_LEAF, scattered_data=True, scattered_nodes=True)
        pool.create_snap(2, 1)
        begins = chance.sample(range(chunks // CLUSTER), -(-clustered // CLUSTER))
        wanted = [begin * CLUSTER + n for begin in begins for n in range(CLUSTER)]
        pool.write(1, wanted[:clustered])
        pool.create_snap(3, 1)
        pool.write(1, chance.sample(range(chunks), scattered))
        pool.create_snap(4, 1)
        pool.write(1, chance.sample(range(chunks), few))
        pool.create_snap(5, 1)
        pool.create_snap(6, 1)
        pool.commit()
    unfinished.rename(path)


if __name__ == "__main__":
    build(*map(int, sys.argv[1:5]), Path(sys.argv[5]))
