/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_items.h"

#include <endian.h>
#include <string.h>

enum {
        INODE_SIZE = 160,
        LINK_SIZE = 10,    /* index, length of the name */
        EXTLINK_SIZE = 18, /* parent, index, length of the name */
        ENTRY_SIZE = 30,
        INLINE_OFFSET = 21, /* where the data of an inline extent begins */
        EXTENT_SIZE = 53,
};

static uint64_t number(const uint8_t *from, size_t size)
{
        uint64_t value = 0;

        memcpy(&value, from, size);
        return le64toh(value);
}

static uint32_t u32(const uint8_t *from)
{
        return (uint32_t)number(from, 4);
}

static uint16_t u16(const uint8_t *from)
{
        return (uint16_t)number(from, 2);
}

static uint64_t u64(const uint8_t *from)
{
        return number(from, 8);
}

static int refuse(const struct bs_btrfs_item *item, struct bs_error *error, const char *reason)
{
        return bs_fail_block(error, item->key.objectid, reason);
}

int bs_btrfs_inode_parse(const struct bs_btrfs_item *item, struct bs_error *error, struct bs_btrfs_inode *out)
{
        static const uint8_t times[BS_BTRFS_TIMES] = {112, 124, 136, 148};
        const uint8_t *data = item->data;

        if (item->length < INODE_SIZE)
                return refuse(item, error, "an inode item is too short");
        *out = (struct bs_btrfs_inode){
                .generation = u64(data),
                .transid = u64(data + 8),
                .size = u64(data + 16),
                .allocated = u64(data + 24),
                .nlink = u32(data + 40),
                .uid = u32(data + 44),
                .gid = u32(data + 48),
                .mode = u32(data + 52),
                .rdev = u64(data + 56),
                .flags = u64(data + 64),
        };
        for (size_t i = 0; i < BS_BTRFS_TIMES; i++) {
                out->times[i].seconds = (int64_t)u64(data + times[i]);
                out->times[i].nanoseconds = u32(data + times[i] + 8);
        }
        if (out->size > INT64_MAX)
                return refuse(item, error, "a file is larger than files can be");
        return 0;
}

int bs_btrfs_link_parse(const struct bs_btrfs_item *item, struct bs_error *error, uint32_t *at,
                        struct bs_btrfs_link *out)
{
        bool extended = item->key.type == BS_BTRFS_INODE_EXTREF;
        uint32_t fixed = extended ? EXTLINK_SIZE : LINK_SIZE;
        const uint8_t *data = item->data + *at;
        uint32_t left = item->length - *at;

        if (left < fixed)
                return refuse(item, error, "the name of an inode is cut off");
        *out = (struct bs_btrfs_link){
                .parent = extended ? u64(data) : item->key.offset,
                .name = data + fixed,
                .name_length = u16(data + fixed - 2),
        };
        if (out->name_length > left - fixed)
                return refuse(item, error, "the name of an inode is cut off");
        *at += fixed + out->name_length;
        return 0;
}

int bs_btrfs_entry_parse(const struct bs_btrfs_item *item, struct bs_error *error, uint32_t *at,
                         struct bs_btrfs_entry *out)
{
        const uint8_t *data = item->data + *at;
        uint32_t left = item->length - *at;

        if (left < ENTRY_SIZE)
                return refuse(item, error, "a directory entry or extended attribute is cut off");
        *out = (struct bs_btrfs_entry){
                .location = {.objectid = u64(data), .type = data[8], .offset = u64(data + 9)},
                .data_length = u16(data + 25),
                .name_length = u16(data + 27),
                .type = data[29],
                .name = data + ENTRY_SIZE,
        };
        out->data = out->name + out->name_length;
        if ((uint32_t)out->name_length + out->data_length > left - ENTRY_SIZE)
                return refuse(item, error, "a directory entry or extended attribute is cut off");
        *at += ENTRY_SIZE + out->name_length + (uint32_t)out->data_length;
        return 0;
}

static int parse_inline(const struct bs_btrfs_item *item, uint32_t block, struct bs_error *error,
                        struct bs_btrfs_extent *out)
{
        uint64_t length;

        out->data = item->data + INLINE_OFFSET;
        out->data_length = item->length - INLINE_OFFSET;
        /* Kernels have left a wrong logical length at uncompressed data, whose own length tells. */
        length = out->compression ? u64(item->data + 8) : out->data_length;
        /* Its end is taken up to a whole block, which has to fit; none is larger than a node. */
        if (item->key.offset != 0 || length > UINT32_MAX)
                return refuse(item, error, "an inline extent that cannot be");
        out->end = (length + block - 1) / block * block;
        return 0;
}

static int parse_numbers(const struct bs_btrfs_item *item, uint32_t block, struct bs_error *error,
                         struct bs_btrfs_extent *out)
{
        const uint8_t *data = item->data;
        uint64_t length;

        if (item->length < EXTENT_SIZE)
                return refuse(item, error, "an extent item is too short");
        length = u64(data + 45);
        out->address = u64(data + 21);
        out->disk_length = u64(data + 29);
        out->offset = u64(data + 37);
        if (length == 0 || __builtin_add_overflow(out->begin, length, &out->end) || out->end > INT64_MAX ||
            __builtin_add_overflow(out->offset, length, &(uint64_t){0}) ||
            __builtin_add_overflow(out->address, out->disk_length, &(uint64_t){0}))
                return refuse(item, error, "an extent that cannot be");
        if ((out->begin | length | out->address | out->disk_length | out->offset) % block)
                return refuse(item, error, "an extent does not lie on whole blocks");
        if (out->address == 0)
                out->kind = BS_BTRFS_HOLE;
        return 0;
}

int bs_btrfs_extent_parse(const struct bs_btrfs_item *item, uint32_t block, struct bs_error *error,
                          struct bs_btrfs_extent *out)
{
        const uint8_t *data = item->data;

        if (item->length < INLINE_OFFSET)
                return refuse(item, error, "an extent item is too short");
        if (data[17] != 0 || u16(data + 18) != 0)
                return refuse(item, error, "an extent is encoded in a way we do not know");
        if (data[20] > BS_BTRFS_PREALLOC)
                return refuse(item, error, "an extent is of a kind we do not know");
        *out = (struct bs_btrfs_extent){
                .begin = item->key.offset,
                .generation = u64(data),
                .compression = data[16],
                .kind = (enum bs_btrfs_extent_kind)data[20],
        };
        if (out->kind == BS_BTRFS_INLINE)
                return parse_inline(item, block, error, out);
        return parse_numbers(item, block, error, out);
}
