/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_merge.h"

#include "memory.h"
#include "record_sort.h"

enum { TIME_BITS = 24 };

void bs_thin_mappings_deinit(struct bs_thin_mappings *mappings)
{
        bs_free(mappings->words);
        bs_free(mappings->slices);
        *mappings = (struct bs_thin_mappings){.words = NULL};
}

void bs_thin_mappings_clear(struct bs_thin_mappings *mappings)
{
        mappings->count = 0;
        mappings->nr_slices = 0;
}

static int reserve(struct bs_thin_mappings *mappings, size_t more)
{
        if (mappings->capacity - mappings->count < more) {
                size_t capacity = mappings->capacity ? mappings->capacity * 2 : 2048;
                uint64_t *words = bs_realloc(mappings->words, capacity, sizeof(*words));

                if (!words)
                        return -ENOMEM;
                mappings->words = words;
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
        uint32_t begin = 0;
        uint32_t end = leaf->count;

        while (begin < end && bs_thin_key(leaf, begin) < first)
                begin++;
        while (end > begin && bs_thin_key(leaf, end - 1) > last)
                end--;
        if (begin == end)
                return 0;

        uint32_t count = end - begin;
        /* A block holds far fewer entries than the capacity grows by. */
        int result = reserve(mappings, 2 * (size_t)count);

        if (result < 0)
                return result;

        uint64_t *words = mappings->words + mappings->count;

        mappings->slices[mappings->nr_slices++] = (struct bs_thin_slice){
                .low = bs_thin_key(leaf, begin),
                .first = mappings->count,
                .count = count,
        };
        for (uint32_t i = 0; i < count; i++)
                words[i] = bs_thin_key(leaf, begin + i);
        for (uint32_t i = 0; i < count; i++)
                words[count + i] = bs_le64(leaf->values + 8 * (size_t)(begin + i));
        mappings->count += 2 * (size_t)count;
        return 0;
}

/* Goes through mappings in the order of their chunks: those of a slice, then the next slice. */
struct cursor {
        const struct bs_thin_mappings *mappings;
        size_t next_slice;
        const uint64_t *chunks;
        const uint64_t *values;
        size_t left; /* in the slice; 0 at the end */
};

static void open_slice(struct cursor *cursor)
{
        if (cursor->next_slice < cursor->mappings->nr_slices) {
                const struct bs_thin_slice *slice = &cursor->mappings->slices[cursor->next_slice++];

                cursor->chunks = cursor->mappings->words + slice->first;
                cursor->values = cursor->chunks + slice->count;
                cursor->left = slice->count;
        }
}

static struct cursor first_of(struct bs_thin_mappings *mappings)
{
        struct cursor cursor = {.mappings = mappings};

        bs_sort_records(mappings->slices, mappings->nr_slices, sizeof(*mappings->slices),
                        offsetof(struct bs_thin_slice, low));
        open_slice(&cursor);
        return cursor;
}

static void advance(struct cursor *cursor, size_t count)
{
        cursor->chunks += count;
        cursor->values += count;
        cursor->left -= count;
        if (cursor->left == 0)
                open_slice(cursor);
}

/* How many mappings two slices have in common from here on. */
static size_t equal_length(const struct cursor *old, const struct cursor *new)
{
        size_t most = old->left < new->left ? old->left : new->left;
        size_t i = 0;

        while (i < most && old->chunks[i] == new->chunks[i] &&
               (old->values[i] ^ new->values[i]) >> TIME_BITS == 0)
                i++;
        return i;
}

/* How many chunks follow one another from here on, below `limit`. */
static size_t run_length(const struct cursor *cursor, uint64_t limit)
{
        size_t i = 1;

        while (i < cursor->left && cursor->chunks[i] < limit &&
               cursor->chunks[i] - cursor->chunks[i - 1] == 1)
                i++;
        return i;
}

static int report(const struct bs_thin_merge *merge, struct bs_extents *list, uint64_t first, size_t count)
{
        uint64_t last = first + (count - 1);

        if (first < merge->first_chunk)
                first = merge->first_chunk;
        if (last >= merge->end_chunk)
                last = merge->end_chunk - 1;
        if (merge->end_chunk == 0 || first > last)
                return 0;
        return bs_extents_append(list, first * merge->chunk_size, (last - first + 1) * merge->chunk_size);
}

/* Report what one side maps alone, up to what the other side maps next. */
static int report_alone(struct bs_thin_merge *merge, struct cursor *cursor, const struct cursor *other,
                        unsigned side)
{
        struct bs_extents *list = side == 0 ? merge->discarded : merge->changed;
        size_t count = run_length(cursor, other->left ? *other->chunks : UINT64_MAX);
        int result = report(merge, list, *cursor->chunks, count);

        merge->only[side] += count;
        advance(cursor, count);
        return result;
}

int bs_thin_merge(struct bs_thin_merge *merge, struct bs_thin_mappings *base, struct bs_thin_mappings *device)
{
        struct cursor old = first_of(base);
        struct cursor new = first_of(device);
        int result = 0;

        while (result == 0 && old.left + new.left > 0) {
                if (new.left == 0 || (old.left > 0 && *old.chunks < *new.chunks)) {
                        result = report_alone(merge, &old, &new, 0);
                } else if (old.left == 0 || *new.chunks < *old.chunks) {
                        result = report_alone(merge, &new, &old, 1);
                } else {
                        size_t equal = equal_length(&old, &new);

                        if (equal == 0)
                                result = report(merge, merge->changed, *new.chunks, 1);
                        advance(&old, equal ? equal : 1);
                        advance(&new, equal ? equal : 1);
                }
        }
        return result;
}
