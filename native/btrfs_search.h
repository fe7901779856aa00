/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The items of a btrfs tree in the order of their keys, as BTRFS_IOC_TREE_SEARCH_V2 returns them.
 *
 * The kernel is asked for one buffer after the other. Its answers are checked like any outside bytes: lengths
 * fit the buffer, keys ascend and lie in what was asked for, so a cursor always makes progress and ends. The
 * ioctl needs CAP_SYS_ADMIN. Sources: linux/btrfs.h, linux/btrfs_tree.h, fs/btrfs/ioctl.c.
 */
#ifndef BLOCKSNAP_BTRFS_SEARCH_H
#define BLOCKSNAP_BTRFS_SEARCH_H

#include "error.h"
#include "interrupt.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
        BS_BTRFS_INODE_ITEM = 1,
        BS_BTRFS_INODE_REF = 12,
        BS_BTRFS_INODE_EXTREF = 13,
        BS_BTRFS_XATTR_ITEM = 24,
        BS_BTRFS_DIR_ITEM = 84,
        BS_BTRFS_DIR_INDEX = 96,
        BS_BTRFS_EXTENT_DATA = 108,
        BS_BTRFS_ROOT_ITEM = 132,
};

/* Inode numbers of a subvolume's own files: the top directory is the first. */
#define BS_BTRFS_FIRST_INODE 256ULL
#define BS_BTRFS_LAST_INODE (-256ULL)

struct bs_btrfs_key {
        uint64_t objectid;
        uint64_t offset;
        uint8_t type;
};

/* Keys from `first` to `last`, both included, as one compound key; leaves older than `min_transid` are left
 * out. */
struct bs_btrfs_range {
        struct bs_btrfs_key first;
        struct bs_btrfs_key last;
        uint64_t min_transid;
};

struct bs_btrfs_item {
        struct bs_btrfs_key key;
        const uint8_t *data; /* valid until the cursor moves on */
        uint32_t length;
};

/* Bytes that the ioctl's own arguments take in front of the items. */
enum { BS_BTRFS_HEADROOM = 112 };

/*
 * What answers a search: the kernel, or memory in tests and fuzzers. `buffer` is BS_BTRFS_HEADROOM bytes for
 * the source's own use, and behind them room for `*size` bytes of items. `search` puts there as many as fit,
 * each behind a struct btrfs_ioctl_search_header, and counts them; none means that there are no more.
 * -EOVERFLOW, with the size needed in `*size`, when not even one fits. `call` names it in errors.
 */
struct bs_btrfs_source {
        int (*search)(void *context, const struct bs_btrfs_range *range, void *buffer, size_t *size,
                      uint32_t *count);
        void *context;
        const char *call;
};

/* The tree that the file or directory `*fd` is in; the descriptor stays the caller's and outlives the source.
 */
void bs_btrfs_fd_source_init(int *fd, struct bs_btrfs_source *out);

/* Negative, 0 or positive, as one key is before, the same as, or after the other. */
int bs_btrfs_key_compare(const struct bs_btrfs_key *one, const struct bs_btrfs_key *other);

struct bs_btrfs_cursor {
        const struct bs_btrfs_source *source;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        struct bs_btrfs_range range; /* what has not been returned yet */
        struct bs_btrfs_item item;   /* the present one; `data` is NULL when it is still to be found */
        uint8_t *buffer;
        size_t capacity;
        size_t at;
        uint32_t left; /* items in the buffer behind the present one */
        bool ended;
};

/* A cursor that asks for `capacity` bytes at a time; it is nowhere until bs_btrfs_seek(). -ENOMEM. */
int bs_btrfs_cursor_init(const struct bs_btrfs_source *source, const struct bs_interrupt *interrupt,
                         struct bs_error *error, size_t capacity, struct bs_btrfs_cursor *out);
void bs_btrfs_cursor_deinit(struct bs_btrfs_cursor *cursor);

/* Go to the beginning of a range. */
void bs_btrfs_seek(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_range *range);

/*
 * The present item, or NULL at the end of the range. -EUCLEAN with the inode and the reason when the answer
 * makes no sense, -EINTR, or what the source returned.
 */
int bs_btrfs_peek(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_item **out);

/* Leave the present item behind. */
void bs_btrfs_advance(struct bs_btrfs_cursor *cursor);

/* Go to the first item at or after `key` in the range; what is between is not even asked for if not here yet.
 */
int bs_btrfs_forward(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_key *key);

#endif
