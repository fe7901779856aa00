/* SPDX-License-Identifier: Apache-2.0 */
/* Thin-pool metadata in memory, built node by node, and a reader of it that can misbehave. */
#ifndef BLOCKSNAP_THIN_IMAGE_H
#define BLOCKSNAP_THIN_IMAGE_H

#include "thin_meta.h"

enum { IMAGE_BLOCKS = 1024, INTERNAL = 1, LEAF = 2 };

struct image {
        uint8_t blocks[IMAGE_BLOCKS][BS_THIN_BLOCK_SIZE];
        unsigned reads;                    /* requests so far */
        uint64_t last_block;               /* where the latest request began */
        unsigned torn_reads;               /* so many reads of block 0 find a half-written one */
        unsigned commits;                  /* so many reads of block 0 come right after a commit */
        uint64_t bad_block;                /* reading it fails with EIO; 0 for none */
        void (*hook)(struct image *image); /* called after every read */
};

/* An empty pool: time 5, chunks of 64 KiB, mapping tree's root in block 1, details' root in block 2. */
struct image *image_create(void);
void image_destroy(struct image *image);

/* A reader of `blocks` blocks of the image. */
struct bs_reader image_reader(struct image *image, uint64_t blocks);

/* Make block `block` an empty node. */
void image_node(struct image *image, uint64_t block, uint32_t kind, uint32_t value_size);

/* Append an entry of 8 bytes to a node. */
void image_add(struct image *image, uint64_t block, uint64_t key, uint64_t value);

/* Append a mapping of `chunk` with `time` to a leaf. */
void image_map(struct image *image, uint64_t block, uint64_t chunk, uint32_t time);

/* Add a device with its details; ids ascend from call to call. */
void image_device(struct image *image, uint64_t device_id, uint64_t root, uint64_t mapped_blocks);

/* Change a u32 or u64 of a block. */
void image_poke32(struct image *image, uint64_t block, size_t offset, uint32_t value);
void image_poke64(struct image *image, uint64_t block, size_t offset, uint64_t value);

/* Make the checksum right again. */
void image_seal(struct image *image, uint64_t block);

#endif
