/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is remembered of an inode from one backup to the next, in a compact form of its own: where the extents
 * of a regular file are, or the listing of a directory. docs/design.md specifies the bytes.
 */
#ifndef BLOCKSNAP_BTRFS_STATE_H
#define BLOCKSNAP_BTRFS_STATE_H

#include "btrfs_items.h"
#include "bytes.h"

enum {
        BS_BTRFS_STATE_EXTENTS = 0x01, /* the first byte, which is the version too */
        BS_BTRFS_STATE_LISTING = 0x81,
        BS_BTRFS_SUBVOLUME = 8, /* as the kind of a name, beside BTRFS_FT_* of 0 to 7 */
};

/* Where the writer or reader of extents is: what the next one is described relative to. */
struct bs_btrfs_state_place {
        uint64_t end;
        uint64_t generation;
        uint64_t address;
        uint32_t block;
};

/* Begin the state of a regular file; `block` is a power of two. */
void bs_btrfs_state_begin(struct bs_bytes *bytes, uint32_t block, struct bs_btrfs_state_place *out);

/* Add an extent that begins at or after the end of the last; no hole. What inline data says is not kept. */
void bs_btrfs_state_add(struct bs_bytes *bytes, struct bs_btrfs_state_place *place,
                        const struct bs_btrfs_extent *extent);

/* Begin to read; false when it is none of a regular file with blocks of this size, or of a later version. */
bool bs_btrfs_state_open(struct bs_span *span, uint32_t block, struct bs_btrfs_state_place *out);

/* Take the next extent; at the end its kind is BS_BTRFS_HOLE. False when the bytes make no sense. */
bool bs_btrfs_state_take(struct bs_span *span, struct bs_btrfs_state_place *place,
                         struct bs_btrfs_extent *out);

/* Whether all of a state can be read. */
bool bs_btrfs_state_is_valid(const struct bs_span *span, uint32_t block);

/* A name in a directory. */
struct bs_btrfs_name {
        uint64_t index; /* of the DIR_INDEX */
        uint64_t inode;
        const uint8_t *name;
        size_t length;
        uint8_t kind; /* BTRFS_FT_*, or BS_BTRFS_SUBVOLUME */
};

/* The same for listings, in the order of the indexes; `previous` is the name before, at first zeros. */
void bs_btrfs_listing_begin(struct bs_bytes *bytes);
void bs_btrfs_listing_add(struct bs_bytes *bytes, const struct bs_btrfs_name *previous,
                          const struct bs_btrfs_name *name);
bool bs_btrfs_listing_open(struct bs_span *span);

/* Take the next name: `*name` is the one before, at first zeros. At the end its length is 0. */
bool bs_btrfs_listing_take(struct bs_span *span, struct bs_btrfs_name *name);

#endif
