/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the items of a btrfs subvolume say: inodes, their names, extended attributes and extents.
 *
 * All numbers are little endian and nothing is aligned. Every length is checked; what does not make sense is
 * -EUCLEAN with the inode and the reason. Layouts: linux/btrfs_tree.h.
 */
#ifndef BLOCKSNAP_BTRFS_ITEMS_H
#define BLOCKSNAP_BTRFS_ITEMS_H

#include "btrfs_search.h"

/* Seconds since the epoch, and nanoseconds. */
struct bs_btrfs_time {
        int64_t seconds;
        uint32_t nanoseconds;
};

enum { BS_BTRFS_ATIME, BS_BTRFS_CTIME, BS_BTRFS_MTIME, BS_BTRFS_OTIME, BS_BTRFS_TIMES };

struct bs_btrfs_inode {
        uint64_t generation; /* of the file: two files of one number differ in it */
        uint64_t transid;    /* when it was last changed */
        uint64_t size;
        uint64_t allocated; /* bytes of its extents, those beyond the end included, holes not */
        uint64_t rdev;      /* major << 20 | minor */
        uint64_t flags;
        uint32_t nlink;
        uint32_t uid;
        uint32_t gid;
        uint32_t mode;
        struct bs_btrfs_time times[BS_BTRFS_TIMES];
};

/* An INODE_ITEM. */
int bs_btrfs_inode_parse(const struct bs_btrfs_item *item, struct bs_error *error,
                         struct bs_btrfs_inode *out);

/* One name of an inode. */
struct bs_btrfs_link {
        uint64_t parent;
        const uint8_t *name;
        uint16_t name_length;
};

/*
 * The next name in an INODE_REF or INODE_EXTREF, which hold several; `*at`, at first 0, is where it begins
 * and then where the one after it does. There are no more when it is the length of the item.
 */
int bs_btrfs_link_parse(const struct bs_btrfs_item *item, struct bs_error *error, uint32_t *at,
                        struct bs_btrfs_link *out);

/* One entry of a DIR_ITEM, DIR_INDEX or XATTR_ITEM. */
struct bs_btrfs_entry {
        struct bs_btrfs_key location; /* what a name leads to */
        const uint8_t *name;
        const uint8_t *data; /* of an extended attribute */
        uint16_t name_length;
        uint16_t data_length;
        uint8_t type; /* BTRFS_FT_* */
};

/* The next entry in such an item, several where names have the same hash; `*at` as above. */
int bs_btrfs_entry_parse(const struct bs_btrfs_item *item, struct bs_error *error, uint32_t *at,
                         struct bs_btrfs_entry *out);

enum bs_btrfs_extent_kind {
        BS_BTRFS_INLINE = 0, /* the numbers are those of the item */
        BS_BTRFS_REGULAR = 1,
        BS_BTRFS_PREALLOC = 2,
        BS_BTRFS_HOLE = 3,
};

/*
 * What a part of a file is, [begin, end) in bytes. The four numbers of a regular extent, together with kind
 * and compression, name its content: the same numbers at the same position of a file are the same bytes.
 */
struct bs_btrfs_extent {
        uint64_t begin;
        uint64_t end;
        uint64_t generation;
        uint64_t address;     /* of the whole extent, in the filesystem's own address space */
        uint64_t disk_length; /* bytes of it there */
        uint64_t offset;      /* of `begin` in it, uncompressed */
        const uint8_t *data;  /* inline content as it is stored; NULL when that is not known */
        uint32_t data_length;
        enum bs_btrfs_extent_kind kind;
        uint8_t compression;
};

/*
 * An EXTENT_DATA. Positions are multiples of `block`, the filesystem's sector size; an inline extent ends
 * where the block of its last byte ends.
 */
int bs_btrfs_extent_parse(const struct bs_btrfs_item *item, uint32_t block, struct bs_error *error,
                          struct bs_btrfs_extent *out);

#endif
