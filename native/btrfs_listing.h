/* SPDX-License-Identifier: Apache-2.0 */
/* Which names a directory gained and lost, told by its DIR_INDEX items or by what was remembered of them. */
#ifndef BLOCKSNAP_BTRFS_LISTING_H
#define BLOCKSNAP_BTRFS_LISTING_H

#include "btrfs_state.h"

/* Gives the names of a directory in the order of their indexes; one without length is the end. */
struct bs_btrfs_name_source {
        int (*next)(void *context, struct bs_btrfs_name *out);
        void *context;
};

/* Those of an inode that a cursor has come to. */
struct bs_btrfs_tree_names {
        struct bs_btrfs_cursor *cursor;
        uint64_t inode;
        bool began;
};

struct bs_btrfs_name_source bs_btrfs_tree_names(struct bs_btrfs_tree_names *names);

/* Those of a state. */
struct bs_btrfs_state_names {
        struct bs_span span;
        struct bs_btrfs_name name;
        struct bs_error *error;
        uint64_t inode;
};

/* A state without a byte is that of a directory without names; -EUCLEAN for one that is no listing. */
int bs_btrfs_state_names_init(const struct bs_span *state, uint64_t inode, struct bs_error *error,
                              struct bs_btrfs_state_names *out);
struct bs_btrfs_name_source bs_btrfs_state_names(struct bs_btrfs_state_names *names);

/*
 * Write the names that only one of two listings has, the same place with another name, inode or kind counted
 * in both. Each is index and inode of 8 bytes, kind and length of one, and the name. `remember` is NULL, or
 * where to write the state of the present directory to.
 */
int bs_btrfs_compare_names(struct bs_btrfs_name_source old, struct bs_btrfs_name_source present,
                           struct bs_bytes *added, struct bs_bytes *removed, struct bs_bytes *remember);

#endif
