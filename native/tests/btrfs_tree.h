/* SPDX-License-Identifier: Apache-2.0 */
/* A btrfs subvolume tree in memory: items in the order of their keys, and a source that answers from them. */
#ifndef BLOCKSNAP_BTRFS_TREE_H
#define BLOCKSNAP_BTRFS_TREE_H

#include "btrfs_items.h"
#include "bytes.h"

#include <sys/stat.h>

enum {
        TREE_ITEMS = 20000,
        TREE_BYTES = 1 << 21,
        TREE_BLOCK = 4096,
        FILE_MODE = S_IFREG | 0644,
        FOLDER_MODE = S_IFDIR | 0755
};

struct tree_item {
        struct bs_btrfs_key key;
        uint64_t transid; /* of the leaf it is in */
        uint32_t offset;  /* of its data */
        uint32_t length;
};

struct tree {
        struct tree_item items[TREE_ITEMS];
        size_t count;
        uint8_t data[TREE_BYTES];
        size_t used;
        uint64_t transid;    /* given to what is added from now on */
        size_t answer_limit; /* most bytes in one answer; 0: what the buffer holds */
        unsigned searches;   /* so far */
        unsigned failing;    /* the search that fails with EIO; 0: none */
        void (*hook)(struct tree *tree, uint8_t *items, uint32_t *count); /* may falsify an answer */
};

struct tree *tree_create(void);
void tree_destroy(struct tree *tree);
struct bs_btrfs_source tree_source(struct tree *tree);

/* Add an item; they may come in any order. Returns its data, which the caller may change. */
uint8_t *tree_add(struct tree *tree, uint64_t objectid, uint8_t type, uint64_t offset, const void *data,
                  size_t length);

/* Take an item away. */
void tree_remove(struct tree *tree, uint64_t objectid, uint8_t type, uint64_t offset);

/* Add an INODE_ITEM of one link, with a generation of 5 and the tree's transid; returns its data. */
uint8_t *tree_inode(struct tree *tree, uint64_t number, uint32_t mode, uint64_t size, uint64_t allocated);

/* Add an extent of a file; address 0 is a hole. Its generation is the tree's transid, its disk length
 * `length`. */
uint8_t *tree_extent(struct tree *tree, uint64_t number, uint8_t kind, uint64_t begin, uint64_t length,
                     uint64_t address);

/* Add inline data, at the beginning of a file. */
void tree_inline(struct tree *tree, uint64_t number, const char *data);

/* Add a name to a directory, and the DIR_ITEM and INODE_REF that go with it. */
void tree_name(struct tree *tree, uint64_t directory, uint64_t index, const char *name, uint64_t number,
               uint8_t kind);

/*
 * A directory 256 with a file 257 of three extents, a link 258 and a directory 259, all of generation 5 and
 * transaction 10.
 */
struct tree *tree_of_files(void);

/* Add an inode to what bs_btrfs_diff() takes as memory; a state without data is one that is not known. */
void memory_add(struct bs_bytes *memory, uint64_t inode, uint64_t generation, uint64_t size,
                struct bs_span state);

/* Put a number in place, little endian. */
void tree_poke(uint8_t *at, uint64_t value, size_t size);

#endif
