/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_merge.h"

#include "memory.h"

#include <stdlib.h>

enum { TIME_BITS = 24 };

void bs_thin_mappings_deinit(struct bs_thin_mappings *mappings)
{
        bs_free(mappings->items);
        bs_free(mappings->slices);
        *mappings = (struct bs_thin_mappings){.items = NULL};
}

void bs_thin_mappings_clear(struct bs_thin_mappings *mappings)
{
        mappings->count = 0;
        mappings->nr_slices = 0;
}

static int reserve(struct bs_thin_mappings *mappings, size_t more)
{
        if (mappings->capacity - mappings->count < more) {
                size_t capacity = mappings->capacity ? mappings->capacity * 2 : 1024;
                struct bs_thin_mapping *items = bs_realloc(mappings->items, capacity, sizeof(*items));

                if (!items)
                        return -ENOMEM;
                mappings->items = items;
                mappings->capacity = capacity;
        }
        if (mappings->nr_slices == mappings->slices_capacity) {
                size_t capacity = mappings->slices_capacity ? mappings->slices_capacity * 2 : 64;
                struct bs_thin_slice *slices = bs_realloc(mappings->slices, capacity, sizeof(*slices));

                if (!slices)
                        return -ENOMEM;
                mappings->slices = slices;
                mappings->slices_capacity = capacity;
        }
        return 0;
}

int bs_thin_mappings_add(struct bs_thin_mappings *mappings, const struct bs_thin_node *leaf, uint64_t first,
                         uint64_t last)
{
        /* A block holds far fewer entries than the capacity grows by. */
        int result = reserve(mappings, leaf->count);
        struct bs_thin_slice slice = {.first = mappings->count};

        if (result < 0)
                return result;
        for (uint32_t i = 0; i < leaf->count; i++) {
                uint64_t chunk = bs_thin_key(leaf, i);

                if (chunk > last)
                        break;
                if (chunk >= first)
                        mappings->items[mappings->count++] = (struct bs_thin_mapping){
                                .chunk = chunk,
                                .value = bs_thin_value(leaf, i),
                        };
        }
        slice.count = mappings->count - slice.first;
        if (slice.count == 0)
                return 0;
        slice.low = mappings->items[slice.first].chunk;
        mappings->slices[mappings->nr_slices++] = slice;
        return 0;
}

static int compare_slices(const void *left, const void *right)
{
        uint64_t a = ((const struct bs_thin_slice *)left)->low;
        uint64_t b = ((const struct bs_thin_slice *)right)->low;

        return (a > b) - (a < b);
}

/* Goes through mappings in the order of their chunks. */
struct cursor {
        const struct bs_thin_mappings *mappings;
        size_t slice;
        size_t at;
};

static struct cursor first_of(struct bs_thin_mappings *mappings)
{
        if (mappings->nr_slices > 1)
                qsort(mappings->slices, mappings->nr_slices, sizeof(*mappings->slices), compare_slices);
        return (struct cursor){.mappings = mappings};
}

static const struct bs_thin_mapping *current(const struct cursor *cursor)
{
        if (cursor->slice == cursor->mappings->nr_slices)
                return NULL;
        return &cursor->mappings->items[cursor->mappings->slices[cursor->slice].first + cursor->at];
}

static void advance(struct cursor *cursor)
{
        if (++cursor->at == cursor->mappings->slices[cursor->slice].count) {
                cursor->at = 0;
                cursor->slice++;
        }
}

static int report(const struct bs_thin_merge *merge, struct bs_extents *list, uint64_t chunk)
{
        if (chunk < merge->first_chunk || chunk >= merge->end_chunk)
                return 0;
        return bs_extents_append(list, chunk * merge->chunk_size, merge->chunk_size);
}

int bs_thin_merge(struct bs_thin_merge *merge, struct bs_thin_mappings *base, struct bs_thin_mappings *device)
{
        struct cursor old = first_of(base);
        struct cursor new = first_of(device);
        int result = 0;

        while (result == 0) {
                const struct bs_thin_mapping *was = current(&old);
                const struct bs_thin_mapping *is = current(&new);

                if (!was && !is)
                        break;
                if (!is || (was && was->chunk < is->chunk)) {
                        result = report(merge, merge->discarded, was->chunk);
                        merge->only[0]++;
                        advance(&old);
                } else if (!was || is->chunk < was->chunk) {
                        result = report(merge, merge->changed, is->chunk);
                        merge->only[1]++;
                        advance(&new);
                } else {
                        if (was->value >> TIME_BITS != is->value >> TIME_BITS)
                                result = report(merge, merge->changed, is->chunk);
                        advance(&old);
                        advance(&new);
                }
        }
        return result;
}
