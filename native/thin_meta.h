/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The metadata of a dm-thin pool: superblock, btree nodes, looking up a device.
 *
 * Everything is little endian and comes in blocks of 4096 bytes. Nothing read is believed before it is
 * checked: whoever can write the metadata device must not be able to make a reader crash or loop.
 * The layouts are those of the kernel's dm-thin-metadata.c and persistent-data/dm-btree-internal.h.
 */
#ifndef BLOCKSNAP_THIN_META_H
#define BLOCKSNAP_THIN_META_H

#include "error.h"
#include "interrupt.h"
#include "io.h"
#include "little_endian.h"

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
        BS_THIN_BLOCK_SIZE = 4096,
        /* The kernel walks with a stack of this many nodes, so no tree is deeper. */
        BS_THIN_MAX_DEPTH = 64,
        /* Device ids, and the time in a mapping, have 24 bits. */
        BS_THIN_MAX_24_BITS = 0xffffff,
        /* The first u32 of a block is crc32c of the rest, xor a number that depends on the block's kind. */
        BS_THIN_SUPERBLOCK_SALT = 160774,
        BS_THIN_NODE_SALT = 121107,
};

/* The superblock, as far as a reader needs it. */
struct bs_thin_superblock {
        uint32_t flags; /* bit 0: the pool wants thin_check */
        uint32_t time;  /* one more at every snapshot in the pool */
        uint64_t transaction_id;
        uint64_t held_root; /* block of the metadata snapshot, 0 for none */
        uint64_t mapping_root;
        uint64_t details_root;
        uint64_t chunk_size; /* bytes of a data block */
        /*
         * Blocks the metadata space map knows. This, not the superblock's own metadata_nr_blocks, is the
         * size of the metadata: the kernel writes that field when it formats the pool and leaves it
         * behind when the metadata device is extended.
         */
        uint64_t metadata_blocks;
};

/* One thin device: its root in the mapping tree, and its details. */
struct bs_thin_device {
        uint64_t root;
        uint64_t mapped_blocks;
        uint64_t transaction_id;
        uint32_t creation_time;
        uint32_t snapshotted_time;
};

/* A superblock and one device of it, read from the same transaction. */
struct bs_thin_view {
        struct bs_thin_superblock superblock;
        struct bs_thin_device device;
};

/* Where a node was found and what its parent says about it: keys are in [low, last]. */
struct bs_thin_place {
        uint64_t block;
        uint64_t low;
        uint64_t last;
};

/* A checked node; keys and values point into its block. */
struct bs_thin_node {
        const uint8_t *keys;
        const uint8_t *values;
        uint32_t count;
        uint32_t value_size;
        bool leaf;
};

static inline uint64_t bs_thin_key(const struct bs_thin_node *node, uint32_t index)
{
        return bs_le64(node->keys + 8 * (size_t)index);
}

/* The value at `index`: a child's block number, or in a leaf of 8-byte values the value itself. */
static inline uint64_t bs_thin_value(const struct bs_thin_node *node, uint32_t index)
{
        return bs_le64(node->values + (size_t)node->value_size * index);
}

/* Where child `index` of an internal node, itself found at `place`, is and which keys it may hold. */
static inline struct bs_thin_place bs_thin_child(const struct bs_thin_node *node,
                                                 const struct bs_thin_place *place, uint32_t index)
{
        return (struct bs_thin_place){
                .block = bs_thin_value(node, index),
                .low = bs_thin_key(node, index),
                .last = index + 1 < node->count ? bs_thin_key(node, index + 1) - 1 : place->last,
        };
}

/* Crc32c of a block as dm stores it in the block's first four bytes. */
uint32_t bs_thin_checksum(const uint8_t *block, uint32_t salt);

/*
 * Check a superblock, found at block `number`, and take it apart. That is block 0, or the copy of it that
 * is the root of a metadata snapshot; a copy has no space maps, so its `metadata_blocks` is 0. -EUCLEAN with
 * the reason when it is not a superblock we can read.
 */
int bs_thin_superblock_parse(const uint8_t *block, uint64_t number, struct bs_error *error,
                             struct bs_thin_superblock *out);

/*
 * Check a btree node: checksum, own address, kind, counts that fit the block, values of `value_size`
 * bytes in a leaf (8 in an internal node), keys strictly ascending within what `place` allows.
 * -EUCLEAN with block and reason otherwise. `out` points into `block`.
 */
int bs_thin_node_parse(const uint8_t *block, const struct bs_thin_place *place, uint32_t value_size,
                       struct bs_error *error, struct bs_thin_node *out);

/* 0 when block number `block` may be a node in a pool of `metadata_blocks`, else -EUCLEAN. */
int bs_thin_block_check(uint64_t block, uint64_t metadata_blocks, struct bs_error *error);

/*
 * Find a device. Reads block 0 again while it is caught in mid-write, and starts over while the pool
 * commits between the reads, so that what is returned belongs to one transaction. -ENOKEY when the pool
 * has no such device; -EAGAIN when it commits faster than that can be done, hundreds of times in a row.
 *
 * With `held_root` not 0 the device is looked up in the metadata snapshot there, which no commit disturbs;
 * -ERANGE when that is not the one the pool holds.
 */
int bs_thin_find(const struct bs_reader *reader, uint64_t held_root, uint64_t device_id,
                 const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_thin_view *out);

/*
 * Make sure that a device is still what it was at `then`, so that no node of its tree was reused meanwhile;
 * -EUCLEAN when it is not, and whatever bs_thin_find() may return.
 */
int bs_thin_check_unchanged(const struct bs_reader *reader, uint64_t held_root, uint64_t device_id,
                            const struct bs_thin_device *then, const struct bs_interrupt *interrupt,
                            struct bs_error *error);

#endif
