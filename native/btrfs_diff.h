/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What differs between a read-only snapshot of a btrfs subvolume and an earlier one of the same subvolume.
 *
 * First bs_btrfs_touched(): whatever is done to an inode after a snapshot gives its INODE_ITEM a transaction
 * at or after that of the snapshot. Then bs_btrfs_diff(), for some of these inodes after the other: all items
 * of the inode, against those of the earlier snapshot or, when that is gone, against what was remembered.
 * Memory is that of the answer, and a buffer for each of the trees.
 */
#ifndef BLOCKSNAP_BTRFS_DIFF_H
#define BLOCKSNAP_BTRFS_DIFF_H

#include "btrfs_extents.h"

struct bs_btrfs_touched {
        struct bs_bytes numbers;      /* u64 each, ascending */
        struct bs_bytes transactions; /* u64 each, the transid of the same inodes */
        struct bs_bytes modes;        /* u32 each */
        uint64_t items;               /* read from the tree */
};

void bs_btrfs_touched_deinit(struct bs_btrfs_touched *touched);

/*
 * The inodes with a name that may have changed since a snapshot of transaction `since`; 0 for all. They are
 * those of later transactions, and directories of the same: a snapshot can get its name in its own source
 * after the copy.
 */
int bs_btrfs_touched(const struct bs_btrfs_source *tree, uint64_t since, const struct bs_interrupt *interrupt,
                     struct bs_error *error, struct bs_btrfs_touched *out);

/* Length of a state that the earlier backup does not have. */
#define BS_BTRFS_NO_STATE UINT64_MAX

struct bs_btrfs_diff {
        const struct bs_btrfs_source *tree;
        const struct bs_btrfs_source *base; /* NULL: `memory` is what there is */
        const uint8_t *numbers;             /* u64 each, ascending: the inodes to compare */
        size_t count;
        /*
         * What is remembered of some of them, ascending: number, generation, size and length of the state,
         * u64 each, and the state. Those that it lacks are new.
         */
        struct bs_span memory;
        uint32_t block; /* the filesystem's sector size, a power of two */
        bool remember;  /* write states */
        size_t limit;   /* stop after the inode with which the answer has this many bytes */
};

/*
 * Compare inodes and write a record for each that the tree has: all fields little endian,
 *
 *   u64  number, generation, size, rdev, flags
 *   i64  seconds of atime, ctime, mtime, otime
 *   u32  nanoseconds of the same; mode, uid, gid, nlink, is_new
 *   u64  lengths of the eight parts that follow
 *
 *   changed, holes    packed extents
 *   added, removed    names as bs_btrfs_compare_names() writes them
 *   links             u64 parent, u16 length, name
 *   xattrs            u16 length of the name, u16 length of the value, name, value
 *   target            of a symbolic link
 *   state             to be remembered; empty when it is not known or not wanted
 *
 * A file whose extents do not add up, because they were moved while they were read, is changed as a whole.
 * `*done` is how many of the inodes were looked at. -ERANGE when they do not ascend, -EUCLEAN as always.
 */
int bs_btrfs_diff(const struct bs_btrfs_diff *diff, const struct bs_interrupt *interrupt,
                  struct bs_error *error, struct bs_bytes *out, size_t *done);

/* What differs between two files, whose trees may be the same: two clones, or one file in two snapshots. */
struct bs_btrfs_file {
        const struct bs_btrfs_source *tree;
        uint64_t inode;
};

struct bs_btrfs_file_diff {
        struct bs_extents changed;
        struct bs_extents holes;
        struct bs_bytes state;
        uint64_t size;
};

void bs_btrfs_file_diff_deinit(struct bs_btrfs_file_diff *diff);

/* -ENOENT when a tree has no such inode, -ERANGE when one is no regular file. */
int bs_btrfs_diff_file(const struct bs_btrfs_file *old, const struct bs_btrfs_file *present, uint32_t block,
                       const struct bs_interrupt *interrupt, struct bs_error *error,
                       struct bs_btrfs_file_diff *out);

#endif
