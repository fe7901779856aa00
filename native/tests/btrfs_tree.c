/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_tree.h"

#include "btrfs_diff.h"
#include "check.h"

#include <endian.h>
#include <linux/btrfs.h>

enum { HEADER = sizeof(struct btrfs_ioctl_search_header) };

void tree_poke(uint8_t *at, uint64_t value, size_t size)
{
        value = htole64(value);
        memcpy(at, &value, size);
}

struct tree *tree_create(void)
{
        struct tree *tree = bs_alloc_zeroed(sizeof(*tree));

        CHECK(tree);
        tree->transid = 10;
        return tree;
}

void tree_destroy(struct tree *tree)
{
        bs_free(tree);
}

static bool is_asked_for(const struct tree_item *item, const struct bs_btrfs_range *range)
{
        return item->transid >= range->min_transid && bs_btrfs_key_compare(&item->key, &range->first) >= 0 &&
               bs_btrfs_key_compare(&item->key, &range->last) <= 0;
}

static size_t put_item(const struct tree *tree, const struct tree_item *item, uint8_t *to)
{
        struct btrfs_ioctl_search_header header = {
                .transid = item->transid,
                .objectid = item->key.objectid,
                .offset = item->key.offset,
                .type = item->key.type,
                .len = item->length,
        };

        memcpy(to, &header, HEADER);
        memcpy(to + HEADER, tree->data + item->offset, item->length);
        return HEADER + item->length;
}

static int search(void *context, const struct bs_btrfs_range *range, void *buffer, size_t *size,
                  uint32_t *count)
{
        struct tree *tree = context;
        uint8_t *items = (uint8_t *)buffer + BS_BTRFS_HEADROOM;
        size_t room = tree->answer_limit && tree->answer_limit < *size ? tree->answer_limit : *size;
        size_t used = 0;

        *count = 0;
        if (++tree->searches == tree->failing)
                return -EIO;
        for (size_t i = 0; i < tree->count; i++) {
                const struct tree_item *item = &tree->items[i];

                if (!is_asked_for(item, range))
                        continue;
                if (HEADER + item->length > room - used) {
                        *size = HEADER + item->length;
                        if (*count == 0)
                                return -EOVERFLOW;
                        break;
                }
                used += put_item(tree, item, items + used);
                ++*count;
        }
        if (tree->hook)
                tree->hook(tree, items, count);
        return 0;
}

struct bs_btrfs_source tree_source(struct tree *tree)
{
        return (struct bs_btrfs_source){.search = search, .context = tree, .call = "search"};
}

uint8_t *tree_add(struct tree *tree, uint64_t objectid, uint8_t type, uint64_t offset, const void *data,
                  size_t length)
{
        struct tree_item item = {
                .key = {.objectid = objectid, .type = type, .offset = offset},
                .transid = tree->transid,
                .offset = (uint32_t)tree->used,
                .length = (uint32_t)length,
        };
        size_t at = tree->count;

        CHECK(tree->count < TREE_ITEMS && length <= TREE_BYTES - tree->used);
        while (at > 0 && bs_btrfs_key_compare(&tree->items[at - 1].key, &item.key) > 0)
                at--;
        memmove(tree->items + at + 1, tree->items + at, (tree->count - at) * sizeof(item));
        tree->items[at] = item;
        tree->count++;
        if (length > 0)
                memcpy(tree->data + tree->used, data, length);
        tree->used += length;
        return tree->data + item.offset;
}

void tree_remove(struct tree *tree, uint64_t objectid, uint8_t type, uint64_t offset)
{
        const struct bs_btrfs_key key = {.objectid = objectid, .type = type, .offset = offset};

        for (size_t i = 0; i < tree->count; i++) {
                if (bs_btrfs_key_compare(&tree->items[i].key, &key) != 0)
                        continue;
                tree->count--;
                memmove(tree->items + i, tree->items + i + 1, (tree->count - i) * sizeof(*tree->items));
                return;
        }
        CHECK(false);
}

uint8_t *tree_inode(struct tree *tree, uint64_t number, uint32_t mode, uint64_t size, uint64_t allocated)
{
        uint8_t item[160] = {0};

        tree_poke(item, 5, 8);
        tree_poke(item + 8, tree->transid, 8);
        tree_poke(item + 16, size, 8);
        tree_poke(item + 24, allocated, 8);
        tree_poke(item + 40, 1, 4);
        tree_poke(item + 52, mode, 4);
        return tree_add(tree, number, BS_BTRFS_INODE_ITEM, 0, item, sizeof(item));
}

uint8_t *tree_extent(struct tree *tree, uint64_t number, uint8_t kind, uint64_t begin, uint64_t length,
                     uint64_t address)
{
        uint8_t item[53] = {0};

        tree_poke(item, tree->transid, 8);
        tree_poke(item + 8, length, 8);
        item[20] = kind;
        tree_poke(item + 21, address, 8);
        tree_poke(item + 29, address ? length : 0, 8);
        tree_poke(item + 45, length, 8);
        return tree_add(tree, number, BS_BTRFS_EXTENT_DATA, begin, item, sizeof(item));
}

void tree_inline(struct tree *tree, uint64_t number, const char *data)
{
        uint8_t item[21 + 4096] = {0};
        size_t length = strlen(data);

        CHECK(length <= 4096);
        tree_poke(item, tree->transid, 8);
        tree_poke(item + 8, length, 8);
        memcpy(item + 21, data, length);
        tree_add(tree, number, BS_BTRFS_EXTENT_DATA, 0, item, 21 + length);
}

void tree_name(struct tree *tree, uint64_t directory, uint64_t index, const char *name, uint64_t number,
               uint8_t kind)
{
        uint8_t item[30 + 255] = {0};
        uint8_t link[10 + 255] = {0};
        size_t length = strlen(name);

        CHECK(length <= 255);
        tree_poke(item, number, 8);
        item[8] = BS_BTRFS_INODE_ITEM;
        tree_poke(item + 27, length, 2);
        item[29] = kind;
        memcpy(item + 30, name, length);
        tree_add(tree, directory, BS_BTRFS_DIR_INDEX, index, item, 30 + length);
        tree_add(tree, directory, BS_BTRFS_DIR_ITEM, index * 7919, item, 30 + length);
        tree_poke(link, index, 8);
        tree_poke(link + 8, length, 2);
        memcpy(link + 10, name, length);
        tree_add(tree, number, BS_BTRFS_INODE_REF, directory, link, 10 + length);
}

struct tree *tree_of_files(void)
{
        struct tree *tree = tree_create();

        tree_inode(tree, 256, FOLDER_MODE, 20, 0);
        tree_name(tree, 256, 2, "file", 257, 1);
        tree_name(tree, 256, 3, "link", 258, 7);
        tree_name(tree, 256, 4, "folder", 259, 2);
        tree_inode(tree, 257, FILE_MODE, 50000, 40960);
        tree_extent(tree, 257, BS_BTRFS_REGULAR, 0, 16384, 1 << 20);
        tree_extent(tree, 257, BS_BTRFS_REGULAR, 16384, 16384, 2 << 20);
        tree_extent(tree, 257, BS_BTRFS_REGULAR, 45056, 8192, 3 << 20);
        tree_inode(tree, 258, S_IFLNK | 0777, 6, 6);
        tree_inline(tree, 258, "target");
        tree_inode(tree, 259, FOLDER_MODE, 0, 0);
        return tree;
}

void memory_add(struct bs_bytes *memory, uint64_t inode, uint64_t generation, uint64_t size,
                struct bs_span state)
{
        bs_bytes_add_number(memory, inode, 8);
        bs_bytes_add_number(memory, generation, 8);
        bs_bytes_add_number(memory, size, 8);
        bs_bytes_add_number(memory, state.data ? state.left : BS_BTRFS_NO_STATE, 8);
        if (state.left)
                bs_bytes_add(memory, state.data, state.left);
}
