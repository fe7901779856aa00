/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_search.h"

#include "memory.h"

#include <linux/btrfs.h>
#include <string.h>
#include <sys/ioctl.h>

/* No item is larger than a node, and no node than 64 KiB. */
enum { LARGEST_BUFFER = 1 << 20 };

_Static_assert(sizeof(struct btrfs_ioctl_search_args_v2) == BS_BTRFS_HEADROOM, "linux/btrfs.h");

static int search_fd(void *context, const struct bs_btrfs_range *range, void *buffer, size_t *size,
                     uint32_t *count)
{
        struct btrfs_ioctl_search_args_v2 *arguments = buffer;

        *arguments = (struct btrfs_ioctl_search_args_v2){
                .key.min_objectid = range->first.objectid,
                .key.max_objectid = range->last.objectid,
                .key.min_offset = range->first.offset,
                .key.max_offset = range->last.offset,
                .key.min_type = range->first.type,
                .key.max_type = range->last.type,
                .key.min_transid = range->min_transid,
                .key.max_transid = UINT64_MAX,
                .key.nr_items = UINT32_MAX,
                .buf_size = *size,
        };
        if (ioctl(*(int *)context, BTRFS_IOC_TREE_SEARCH_V2, arguments) < 0) {
                *size = (size_t)arguments->buf_size;
                return -errno;
        }
        *count = arguments->key.nr_items;
        return 0;
}

void bs_btrfs_fd_source_init(int *fd, struct bs_btrfs_source *out)
{
        *out = (struct bs_btrfs_source){
                .search = search_fd,
                .context = fd,
                .call = "ioctl(BTRFS_IOC_TREE_SEARCH_V2)",
        };
}

int bs_btrfs_key_compare(const struct bs_btrfs_key *one, const struct bs_btrfs_key *other)
{
        if (one->objectid != other->objectid)
                return one->objectid < other->objectid ? -1 : 1;
        if (one->type != other->type)
                return one->type < other->type ? -1 : 1;
        if (one->offset != other->offset)
                return one->offset < other->offset ? -1 : 1;
        return 0;
}

/* Make a key the one after it; false when there is none. */
static bool step(struct bs_btrfs_key *key)
{
        if (++key->offset == 0 && ++key->type == 0)
                return ++key->objectid != 0;
        return true;
}

static int resize(struct bs_btrfs_cursor *cursor, size_t capacity)
{
        uint8_t *buffer = bs_realloc(cursor->buffer, BS_BTRFS_HEADROOM + capacity, 1);

        if (!buffer)
                return -ENOMEM;
        cursor->buffer = buffer;
        cursor->capacity = capacity;
        return 0;
}

int bs_btrfs_cursor_init(const struct bs_btrfs_source *source, const struct bs_interrupt *interrupt,
                         struct bs_error *error, size_t capacity, struct bs_btrfs_cursor *out)
{
        *out = (struct bs_btrfs_cursor){
                .source = source,
                .interrupt = interrupt,
                .error = error,
                .ended = true,
        };
        return resize(out, capacity);
}

void bs_btrfs_cursor_deinit(struct bs_btrfs_cursor *cursor)
{
        bs_free(cursor->buffer);
        cursor->buffer = NULL;
}

void bs_btrfs_seek(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_range *range)
{
        cursor->range = *range;
        cursor->item.data = NULL;
        cursor->left = 0;
        cursor->ended = false;
}

static int refuse(struct bs_btrfs_cursor *cursor, const char *reason)
{
        return bs_fail_block(cursor->error, cursor->range.first.objectid, reason);
}

static int fill(struct bs_btrfs_cursor *cursor)
{
        const struct bs_btrfs_source *source = cursor->source;
        size_t size = cursor->capacity;
        int result = bs_interrupted(cursor->interrupt);

        if (result < 0)
                return result;
        cursor->at = BS_BTRFS_HEADROOM;
        result = source->search(source->context, &cursor->range, cursor->buffer, &size, &cursor->left);
        if (result == -EOVERFLOW) {
                if (size <= cursor->capacity || size > LARGEST_BUFFER)
                        return refuse(cursor, "an item that fits no node");
                result = resize(cursor, size);
                if (result < 0)
                        return result;
                result =
                        source->search(source->context, &cursor->range, cursor->buffer, &size, &cursor->left);
        }
        if (result < 0) {
                cursor->left = 0;
                return bs_fail_call(cursor->error, source->call, result);
        }
        cursor->ended = cursor->left == 0;
        return 0;
}

/* Take the next item out of the buffer; the range shrinks to what is behind it. */
static int take(struct bs_btrfs_cursor *cursor)
{
        struct btrfs_ioctl_search_header header;
        size_t room = BS_BTRFS_HEADROOM + cursor->capacity - cursor->at;

        if (room < sizeof(header))
                return refuse(cursor, "more items than fit the buffer");
        memcpy(&header, cursor->buffer + cursor->at, sizeof(header));
        if (header.len > room - sizeof(header))
                return refuse(cursor, "an item that does not fit the buffer");
        if (header.type > UINT8_MAX)
                return refuse(cursor, "an item of no known type");
        cursor->item = (struct bs_btrfs_item){
                .key = {.objectid = header.objectid, .offset = header.offset, .type = (uint8_t)header.type},
                .data = cursor->buffer + cursor->at + sizeof(header),
                .length = header.len,
        };
        if (bs_btrfs_key_compare(&cursor->item.key, &cursor->range.first) < 0 ||
            bs_btrfs_key_compare(&cursor->item.key, &cursor->range.last) > 0)
                return refuse(cursor, "an item that was not asked for, or comes twice");
        cursor->at += sizeof(header) + header.len;
        cursor->left--;
        cursor->range.first = cursor->item.key;
        if (!step(&cursor->range.first) ||
            bs_btrfs_key_compare(&cursor->range.first, &cursor->range.last) > 0) {
                cursor->range.first = cursor->range.last;
                cursor->ended = true;
                if (cursor->left > 0)
                        return refuse(cursor, "an item that was not asked for, or comes twice");
        }
        return 0;
}

int bs_btrfs_peek(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_item **out)
{
        int result = 0;

        if (!cursor->item.data) {
                if (cursor->left == 0 && !cursor->ended)
                        result = fill(cursor);
                if (result == 0 && cursor->left > 0)
                        result = take(cursor);
        }
        *out = result == 0 && cursor->item.data ? &cursor->item : NULL;
        return result;
}

void bs_btrfs_advance(struct bs_btrfs_cursor *cursor)
{
        cursor->item.data = NULL;
}

int bs_btrfs_forward(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_key *key)
{
        int result = 0;

        while (result == 0 && (cursor->item.data || cursor->left > 0)) {
                if (!cursor->item.data)
                        result = take(cursor);
                if (result == 0 && bs_btrfs_key_compare(&cursor->item.key, key) >= 0)
                        return 0;
                cursor->item.data = NULL;
        }
        if (result < 0)
                return result;
        if (bs_btrfs_key_compare(key, &cursor->range.last) > 0)
                cursor->ended = true;
        else if (bs_btrfs_key_compare(key, &cursor->range.first) > 0)
                cursor->range.first = *key;
        return 0;
}
