/* SPDX-License-Identifier: Apache-2.0 */
#include "extent.h"

#include "memory.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

void bs_extents_init(struct bs_extents *list)
{
        *list = (struct bs_extents){.items = NULL};
}

void bs_extents_deinit(struct bs_extents *list)
{
        bs_free(list->items);
        bs_extents_init(list);
}

static int grow(struct bs_extents *list)
{
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        struct bs_extent *items = bs_realloc(list->items, capacity, sizeof(*items));

        if (!items)
                return -ENOMEM;
        list->items = items;
        list->capacity = capacity;
        return 0;
}

int bs_extents_append(struct bs_extents *list, uint64_t offset, uint64_t length)
{
        struct bs_extent *last = list->count ? &list->items[list->count - 1] : NULL;
        uint64_t end;

        if (length == 0)
                return 0;
        if (__builtin_add_overflow(offset, length, &end))
                return -EOVERFLOW;
        if (last && offset < last->offset + last->length)
                return -EINVAL;
        if (last && offset == last->offset + last->length) {
                last->length += length;
                return 0;
        }
        if (list->count == list->capacity) {
                int result = grow(list);

                if (result < 0)
                        return result;
        }
        list->items[list->count++] = (struct bs_extent){.offset = offset, .length = length};
        return 0;
}

void bs_extent_pack(uint64_t offset, uint64_t length, uint8_t out[BS_PACKED_EXTENT_SIZE])
{
        uint64_t pair[2] = {htole64(offset), htole64(length)};

        memcpy(out, pair, sizeof(pair));
}

void bs_extents_pack(const struct bs_extents *list, uint8_t *out)
{
        for (size_t i = 0; i < list->count; i++, out += BS_PACKED_EXTENT_SIZE)
                bs_extent_pack(list->items[i].offset, list->items[i].length, out);
}
