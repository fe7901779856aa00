/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which bytes of a file differ, told by where its extents are: in two trees, or in one and in what was
 * remembered.
 *
 * A block is unchanged when both sides say the same extent at the same offset in it, the generation included:
 * whatever is written later has a later one, so an address used again does not look the same. Blocks in which
 * the file ends or ended count as changed when its size did: cutting a file within a block makes no new
 * extent. An answer is never too narrow; it is too wide where data was moved (balance, defrag) and stayed the
 * same.
 */
#ifndef BLOCKSNAP_BTRFS_EXTENTS_H
#define BLOCKSNAP_BTRFS_EXTENTS_H

#include "btrfs_state.h"
#include "extent.h"

/* Gives the extents of a file in order; BS_BTRFS_HOLE is the end. */
struct bs_btrfs_extent_source {
        int (*next)(void *context, struct bs_btrfs_extent *out);
        void *context;
};

/* The extents of an inode that a cursor has come to. */
struct bs_btrfs_tree_extents {
        struct bs_btrfs_cursor *cursor;
        uint64_t inode;
        uint32_t block;
        bool began;
        bool has_inline;           /* out: whether there was inline data */
        uint64_t end;              /* of the last one */
        uint64_t allocated;        /* out: bytes of all so far */
        struct bs_bytes *remember; /* NULL, or where to write the state of the file to */
        struct bs_btrfs_state_place place;
};

void bs_btrfs_tree_extents_init(struct bs_btrfs_cursor *cursor, uint64_t inode, uint32_t block,
                                struct bs_bytes *remember, struct bs_btrfs_tree_extents *out);
struct bs_btrfs_extent_source bs_btrfs_tree_source(struct bs_btrfs_tree_extents *extents);

/*
 * Whether the extents that were read are all that the inode has. They are not when balance or dedupe put
 * others in their place meanwhile, which both do in read-only snapshots too. Inline data is counted in
 * another way.
 */
static inline bool bs_btrfs_adds_up(const struct bs_btrfs_tree_extents *extents,
                                    const struct bs_btrfs_inode *inode)
{
        return extents->has_inline || extents->allocated == inode->allocated;
}

/* Those of a state. */
struct bs_btrfs_state_extents {
        struct bs_span span;
        struct bs_btrfs_state_place place;
        bool unknown;
};

/* An empty state is that of a file that had none; one that cannot be read says that nothing is known. */
void bs_btrfs_state_extents_init(const struct bs_span *state, uint32_t block,
                                 struct bs_btrfs_state_extents *out);

/* For a file of which is not known where its extents were: all of it may differ. */
void bs_btrfs_unknown_extents_init(struct bs_btrfs_state_extents *out);
struct bs_btrfs_extent_source bs_btrfs_state_source(struct bs_btrfs_state_extents *extents);

struct bs_btrfs_compare {
        struct bs_btrfs_extent_source old;
        struct bs_btrfs_extent_source present;
        uint64_t old_size;
        uint64_t size;
        uint32_t block; /* the filesystem's sector size */
};

/*
 * Append to `changed` what holds data and may differ, and to `holes` what reads as zeros and held data; both
 * within the present size. Both sources are read to their ends.
 */
int bs_btrfs_compare_extents(const struct bs_btrfs_compare *compare, struct bs_extents *changed,
                             struct bs_extents *holes);

#endif
