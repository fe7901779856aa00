/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_nodes.h"

#include "memory.h"

#include <stdlib.h>

enum {
        /* Blocks of one request. */
        RUN_BLOCKS = 256,
        /* Reading this many blocks in vain is cheaper than another request. */
        RUN_GAP_BLOCKS = 32,
#ifdef BS_TEST_BATCH_RUNS
        BATCH_RUNS = BS_TEST_BATCH_RUNS,
#else
        /* Requests of one batch. */
        BATCH_RUNS = 128,
#endif
};

void bs_thin_places_deinit(struct bs_thin_places *places)
{
        bs_free(places->items);
        *places = (struct bs_thin_places){.items = NULL};
}

static int reserve(struct bs_thin_places *places, size_t more)
{
        size_t capacity = places->capacity ? places->capacity : 256;
        size_t wanted;

        if (__builtin_add_overflow(places->count, more, &wanted))
                return -ENOMEM;
        while (capacity < wanted)
                if (__builtin_mul_overflow(capacity, 2, &capacity))
                        return -ENOMEM;
        if (capacity == places->capacity)
                return 0;

        struct bs_thin_place *items = bs_realloc(places->items, capacity, sizeof(*items));

        if (!items)
                return -ENOMEM;
        places->items = items;
        places->capacity = capacity;
        return 0;
}

int bs_thin_places_add(struct bs_thin_places *places, const struct bs_thin_place *place)
{
        int result = places->count == places->capacity ? reserve(places, 1) : 0;

        if (result == 0)
                places->items[places->count++] = *place;
        return result;
}

int bs_thin_places_extend(struct bs_thin_places *places, const struct bs_thin_places *more)
{
        int result = more->count ? reserve(places, more->count) : 0;

        if (result == 0 && more->count) {
                memcpy(places->items + places->count, more->items, more->count * sizeof(*more->items));
                places->count += more->count;
        }
        return result;
}

static int compare_blocks(const void *left, const void *right)
{
        uint64_t a = ((const struct bs_thin_place *)left)->block;
        uint64_t b = ((const struct bs_thin_place *)right)->block;

        return (a > b) - (a < b);
}

static int compare_keys(const void *left, const void *right)
{
        uint64_t a = ((const struct bs_thin_place *)left)->low;
        uint64_t b = ((const struct bs_thin_place *)right)->low;

        return (a > b) - (a < b);
}

static void sort(struct bs_thin_places *places, int (*compare)(const void *, const void *))
{
        size_t i = 1;

        while (i < places->count && compare(&places->items[i - 1], &places->items[i]) < 0)
                i++;
        if (i < places->count)
                qsort(places->items, places->count, sizeof(*places->items), compare);
}

void bs_thin_places_sort_by_block(struct bs_thin_places *places)
{
        sort(places, compare_blocks);
}

void bs_thin_places_sort_by_key(struct bs_thin_places *places)
{
        sort(places, compare_keys);
}

/* How many of the places, sorted by block, one request can cover. */
static size_t run_length(const struct bs_thin_place *places, size_t count)
{
        size_t i = 1;

        while (i < count && places[i].block - places[i - 1].block <= RUN_GAP_BLOCKS &&
               places[i].block - places[0].block < RUN_BLOCKS)
                i++;
        return i;
}

/* The requests of one batch, and for each how many places it is for. */
struct runs {
        struct bs_read reads[BATCH_RUNS];
        size_t places[BATCH_RUNS];
        size_t count;
};

static void plan_runs(const struct bs_thin_batch *batch, const struct bs_thin_place *places, size_t count,
                      struct runs *out)
{
        size_t used = 0;

        out->count = 0;
        for (size_t at = 0; at < count && out->count < BATCH_RUNS;) {
                size_t length = run_length(places + at, count - at);
                size_t blocks = (size_t)(places[at + length - 1].block - places[at].block) + 1;

                if (used + blocks > BS_THIN_BATCH_BLOCKS)
                        return;
                out->reads[out->count] = (struct bs_read){
                        .offset = places[at].block * BS_THIN_BLOCK_SIZE,
                        .buffer = batch->buffer + used * BS_THIN_BLOCK_SIZE,
                        .length = blocks * BS_THIN_BLOCK_SIZE,
                };
                out->places[out->count++] = length;
                used += blocks;
                at += length;
        }
}

/* Visit the places of one request, whose blocks are in its buffer. */
static int visit_run(const struct bs_read *read, const struct bs_thin_place *places, size_t count,
                     bs_thin_visit_fn visit, void *context)
{
        uint64_t first = read->offset / BS_THIN_BLOCK_SIZE;
        int result = 0;

        for (size_t i = 0; i < count && result == 0; i++) {
                size_t offset = (size_t)(places[i].block - first) * BS_THIN_BLOCK_SIZE;

                result = visit(context, (const uint8_t *)read->buffer + offset, &places[i]);
        }
        return result;
}

static int visit_blocks(const struct bs_thin_batch *batch, const struct bs_read *run,
                        const struct bs_thin_place *places, size_t count, bs_thin_visit_fn visit,
                        void *context)
{
        struct bs_read one = {.buffer = run->buffer, .length = BS_THIN_BLOCK_SIZE};
        int result = 0;

        for (size_t i = 0; i < count && result == 0; i++) {
                one.offset = places[i].block * BS_THIN_BLOCK_SIZE;
                bs_read_many(batch->reader, &one, 1);
                if (one.result < 0)
                        return bs_fail_call(batch->error, batch->reader->call, one.result);
                result = visit_run(&one, &places[i], 1, visit, context);
        }
        return result;
}

int bs_thin_visit_batch(const struct bs_thin_batch *batch, const struct bs_thin_places *places, size_t first,
                        bs_thin_visit_fn visit, void *context, size_t *out)
{
        struct runs runs;
        size_t at = first;

        plan_runs(batch, places->items + first, places->count - first, &runs);
        bs_read_many(batch->reader, runs.reads, runs.count);
        for (size_t i = 0; i < runs.count; i++) {
                const struct bs_read *read = &runs.reads[i];
                const struct bs_thin_place *from = places->items + at;
                int result;

                if (read->result == 0)
                        result = visit_run(read, from, runs.places[i], visit, context);
                else if (read->result == -EIO && read->length > BS_THIN_BLOCK_SIZE)
                        result = visit_blocks(batch, read, from, runs.places[i], visit, context);
                else
                        result = bs_fail_call(batch->error, batch->reader->call, read->result);
                if (result < 0)
                        return result;
                at += runs.places[i];
        }
        *out = at - first;
        return bs_interrupted(batch->interrupt);
}

int bs_thin_visit_all(const struct bs_thin_batch *batch, struct bs_thin_places *places,
                      bs_thin_visit_fn visit, void *context)
{
        bs_thin_places_sort_by_block(places);
        for (size_t at = 0; at < places->count;) {
                size_t visited;
                int result = bs_thin_visit_batch(batch, places, at, visit, context, &visited);

                if (result < 0)
                        return result;
                at += visited;
        }
        return 0;
}
