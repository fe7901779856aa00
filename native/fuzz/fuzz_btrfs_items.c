/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compare two btrfs trees, or one with what was remembered, all of which anybody may have written.
 *
 * The input is a byte of options, three lengths of two bytes, and then the answers to searches of the one
 * tree and of the other and the memory. Mutations of raw answers hardly ever keep their keys in order, so
 * there is another way: items in a short form, that are put into order and answered as the kernel does.
 */
#include "btrfs_diff.h"
#include "cleanup.h"

#include <endian.h>
#include <linux/btrfs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
        ANSWER_RAW = 1,
        AGAINST_MEMORY = 2,
        SMALL_ANSWERS = 4,
        SHORT_MEMORY = 8, /* the memory begins with a number of its own for each inode */
        COMPARE_FILES = 16,
        LIST_TOUCHED = 32,

        HEAD = 7,
        ITEMS = 128,
        ITEM_HEAD = 5,
        LARGEST_INPUT = 1 << 14,
        BLOCK = 4096,
        INODES = 16,
        RECORD_HEAD = 172,
        RECORD_PARTS = 8,
};

struct item {
        struct bs_btrfs_key key;
        uint8_t data[256];
        uint32_t length;
};

struct memory_tree {
        struct bs_span raw;
        struct item items[ITEMS];
        size_t count;
        uint8_t options;
        unsigned searches;
};

static uint64_t number(const uint8_t *from, size_t size)
{
        uint64_t value = 0;

        memcpy(&value, from, size);
        return le64toh(value);
}

static int by_key(const void *one, const void *other)
{
        return bs_btrfs_key_compare(&((const struct item *)one)->key, &((const struct item *)other)->key);
}

/* One item: inode, type, two bytes of offset, length of the data, the data; short inode items are filled up.
 */
static bool take_item(struct bs_span *span, struct item *out)
{
        static const uint8_t types[] = {
                BS_BTRFS_INODE_ITEM, BS_BTRFS_INODE_REF, BS_BTRFS_INODE_EXTREF, BS_BTRFS_XATTR_ITEM,
                BS_BTRFS_DIR_ITEM,   BS_BTRFS_DIR_INDEX, BS_BTRFS_EXTENT_DATA,  48,
        };
        const uint8_t *head = bs_span_take(span, ITEM_HEAD);
        const uint8_t *data = head ? bs_span_take(span, head[4]) : NULL;

        if (!data)
                return false;
        *out = (struct item){
                .key = {.objectid = BS_BTRFS_FIRST_INODE + head[0] % INODES, .type = types[head[1] % 8]},
                .length = head[4],
        };
        memcpy(out->data, data, head[4]);
        if (out->key.type == BS_BTRFS_EXTENT_DATA)
                out->key.offset = number(head + 2, 2) * BLOCK;
        else if (out->key.type != BS_BTRFS_INODE_ITEM)
                out->key.offset = number(head + 2, 2);
        if (out->key.type == BS_BTRFS_INODE_ITEM && head[1] < 128)
                out->length = 160;
        return true;
}

static void tree_init(struct bs_span raw, uint8_t options, struct memory_tree *out)
{
        size_t kept = 0;

        out->raw = raw;
        out->options = options;
        out->count = 0;
        out->searches = 0;
        if (options & ANSWER_RAW)
                return;
        while (out->count < ITEMS && take_item(&raw, &out->items[out->count]))
                out->count++;
        qsort(out->items, out->count, sizeof(*out->items), by_key);
        for (size_t i = 0; i < out->count; i++) {
                if (kept == 0 || by_key(&out->items[i], &out->items[kept - 1]) != 0)
                        out->items[kept++] = out->items[i];
        }
        out->count = kept;
}

static int answer_raw(struct memory_tree *tree, uint8_t *items, size_t room, uint32_t *count)
{
        const uint8_t *head = bs_span_take(&tree->raw, 4);
        size_t length = head ? number(head, 2) : 0;

        if (length > tree->raw.left)
                length = tree->raw.left;
        if (length > room)
                length = room;
        *count = head ? (uint32_t)number(head + 2, 2) : 0;
        memcpy(items, bs_span_take(&tree->raw, length), length);
        /* What is behind was in the buffer before; a header more is enough to make it the same every time. */
        memset(items + length, 0, room - length < 64 ? room - length : 64);
        return 0;
}

static int search(void *context, const struct bs_btrfs_range *range, void *buffer, size_t *size,
                  uint32_t *count)
{
        struct memory_tree *tree = context;
        uint8_t *items = (uint8_t *)buffer + BS_BTRFS_HEADROOM;
        size_t room = *size;
        size_t used = 0;

        /* Every answer brings the cursor on, so there are no more than keys that were answered. */
        if (++tree->searches > 100000)
                abort();
        if (tree->options & ANSWER_RAW)
                return answer_raw(tree, items, room, count);
        if (tree->options & SMALL_ANSWERS)
                room = 400;
        *count = 0;
        for (size_t i = 0; i < tree->count; i++) {
                const struct item *item = &tree->items[i];
                struct btrfs_ioctl_search_header header = {
                        .objectid = item->key.objectid,
                        .offset = item->key.offset,
                        .type = item->key.type,
                        .len = item->length,
                };

                if (bs_btrfs_key_compare(&item->key, &range->first) < 0 ||
                    bs_btrfs_key_compare(&item->key, &range->last) > 0)
                        continue;
                if (sizeof(header) + item->length > room - used)
                        break;
                memcpy(items + used, &header, sizeof(header));
                memcpy(items + used + sizeof(header), item->data, item->length);
                used += sizeof(header) + item->length;
                ++*count;
        }
        return 0;
}

/* Extents are sorted, merged and within the file. */
static void check_extents(const uint8_t *packed, uint64_t length, uint64_t size)
{
        uint64_t end = 0;

        if (length % BS_PACKED_EXTENT_SIZE)
                abort();
        for (uint64_t at = 0; at < length; at += BS_PACKED_EXTENT_SIZE) {
                uint64_t offset = number(packed + at, 8);
                uint64_t bytes = number(packed + at + 8, 8);

                if ((at > 0 && offset <= end) || bytes == 0 || offset > size || bytes > size - offset)
                        abort();
                end = offset + bytes;
        }
}

/* A state that was written can be read. */
static void check_state(const uint8_t *data, uint64_t length, uint64_t mode)
{
        struct bs_span state = {.data = data, .left = (size_t)length};
        struct bs_btrfs_name name = {.length = 0};

        if (length == 0)
                return;
        if (S_ISREG(mode) && !bs_btrfs_state_is_valid(&state, BLOCK))
                abort();
        if (!S_ISDIR(mode))
                return;
        if (!bs_btrfs_listing_open(&state))
                abort();
        do {
                if (!bs_btrfs_listing_take(&state, &name))
                        abort();
        } while (name.length > 0);
}

static void check_records(const struct bs_bytes *records)
{
        uint64_t last = 0;

        for (size_t at = 0; at < records->count;) {
                const uint8_t *head = records->data + at;
                uint64_t parts[RECORD_PARTS];
                uint64_t size = number(head + 16, 8);

                if (records->count - at < RECORD_HEAD || number(head, 8) <= last)
                        abort();
                last = number(head, 8);
                at += RECORD_HEAD;
                for (size_t i = 0; i < RECORD_PARTS; i++) {
                        parts[i] = number(head + RECORD_HEAD - 8 * (RECORD_PARTS - i), 8);
                        if (parts[i] > records->count - at)
                                abort();
                        if (i < 2)
                                check_extents(records->data + at, parts[i], size);
                        if (i == RECORD_PARTS - 1)
                                check_state(records->data + at, parts[i], number(head + 88, 4));
                        at += parts[i];
                }
        }
}

/* Let the memory begin with inodes of our own, so that mutations reach the states. */
static bool fill_memory(struct bs_span *span, struct bs_bytes *out)
{
        for (uint64_t i = 0; i < INODES; i++) {
                const uint8_t *length = bs_span_take(span, 1);
                const uint8_t *state = length ? bs_span_take(span, *length) : NULL;

                if (!state)
                        break;
                bs_bytes_add_number(out, BS_BTRFS_FIRST_INODE + i, 8);
                bs_bytes_add_number(out, 0, 8);
                bs_bytes_add_number(out, 100000, 8);
                bs_bytes_add_number(out, *length, 8);
                bs_bytes_add(out, state, *length);
        }
        return bs_bytes_status(out) == 0;
}

static void check_result(int result, const struct bs_error *error)
{
        if (result < 0 && result != -ENOENT && !((result == -EUCLEAN || result == -ERANGE) && error->reason))
                abort();
}

static void compare_trees(struct memory_tree *tree, struct memory_tree *base, struct bs_span memory)
{
        const struct bs_interrupt never = {.check = NULL};
        struct bs_btrfs_source source = {.search = search, .context = tree, .call = "search"};
        struct bs_btrfs_source base_source = {.search = search, .context = base, .call = "search"};
        uint8_t numbers[8 * INODES];
        _cleanup_(bs_bytes_deinit) struct bs_bytes records = {.data = NULL};
        struct bs_btrfs_diff request = {
                .tree = &source,
                .base = tree->options & AGAINST_MEMORY ? NULL : &base_source,
                .numbers = numbers,
                .count = INODES,
                .memory = memory,
                .block = BLOCK,
                .remember = true,
                .limit = SIZE_MAX,
        };
        struct bs_error error = {.call = NULL};
        size_t done;

        for (uint64_t i = 0; i < INODES; i++) {
                uint64_t inode = htole64(BS_BTRFS_FIRST_INODE + i);

                memcpy(numbers + 8 * i, &inode, 8);
        }

        int result = bs_btrfs_diff(&request, &never, &error, &records, &done);

        check_result(result, &error);
        if (result == 0)
                check_records(&records);
}

static void compare_files(struct memory_tree *tree, struct memory_tree *base)
{
        const struct bs_interrupt never = {.check = NULL};
        struct bs_btrfs_source sources[] = {
                {.search = search, .context = base, .call = "search"},
                {.search = search, .context = tree, .call = "search"},
        };
        struct bs_btrfs_file old = {.tree = &sources[0], .inode = BS_BTRFS_FIRST_INODE + 1};
        struct bs_btrfs_file present = {.tree = &sources[1], .inode = BS_BTRFS_FIRST_INODE + 1};
        _cleanup_(bs_btrfs_file_diff_deinit) struct bs_btrfs_file_diff found;
        struct bs_error error = {.call = NULL};

        check_result(bs_btrfs_diff_file(&old, &present, BLOCK, &never, &error, &found), &error);
}

static void list_touched(struct memory_tree *tree)
{
        const struct bs_interrupt never = {.check = NULL};
        struct bs_btrfs_source source = {.search = search, .context = tree, .call = "search"};
        _cleanup_(bs_btrfs_touched_deinit) struct bs_btrfs_touched touched;
        struct bs_error error = {.call = NULL};
        int result = bs_btrfs_touched(&source, 1, &never, &error, &touched);

        check_result(result, &error);
        if (touched.numbers.count != touched.transactions.count ||
            touched.modes.count * 2 != touched.numbers.count)
                abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        _cleanup_free_ struct memory_tree *trees = bs_alloc_zeroed(2 * sizeof(*trees));
        _cleanup_(bs_bytes_deinit) struct bs_bytes filled = {.data = NULL};
        struct bs_span rest = {.data = data, .left = size};
        struct bs_span parts[3];

        if (!trees || size > LARGEST_INPUT || !bs_span_take(&rest, HEAD))
                return 0;
        for (size_t i = 0; i < 3; i++) {
                size_t length = number(data + 1 + 2 * i, 2);

                parts[i].left = length < rest.left ? length : rest.left;
                parts[i].data = bs_span_take(&rest, parts[i].left);
        }
        if (data[0] & SHORT_MEMORY) {
                if (!fill_memory(&parts[2], &filled))
                        return 0;
                parts[2] = (struct bs_span){.data = filled.data, .left = filled.count};
        }
        tree_init(parts[0], data[0], &trees[0]);
        tree_init(parts[1], data[0], &trees[1]);
        if (data[0] & COMPARE_FILES)
                compare_files(&trees[0], &trees[1]);
        else if (data[0] & LIST_TOUCHED)
                list_touched(&trees[0]);
        else
                compare_trees(&trees[0], &trees[1], parts[2]);
        return 0;
}
