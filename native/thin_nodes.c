/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_nodes.h"

#include "cleanup.h"
#include "record_sort.h"

enum {
        /* Blocks of one request. */
        RUN_BLOCKS = 64,
        /* Reading this many blocks in vain is cheaper than another request: 4, 8, 16 and 32 were tried. */
        RUN_GAP_BLOCKS = 8,
#ifdef BS_TEST_BATCH_RUNS
        MAX_RUNS = BS_TEST_BATCH_RUNS,
#else
        /* Requests under way at a time. */
        MAX_RUNS = 128,
#endif
        /* So many are begun together, if there are. */
        FEW_RUNS = MAX_RUNS / 4,
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

void bs_thin_places_sort_by_block(struct bs_thin_places *places)
{
        bs_sort_records(places->items, places->count, sizeof(*places->items),
                        offsetof(struct bs_thin_place, block));
}

/* Places that are in order already. */
struct segment {
        uint64_t low;
        size_t first;
        size_t count;
};

static size_t find_segments(const struct bs_thin_places *places, struct segment *out)
{
        size_t count = 0;

        for (size_t i = 0; i < places->count; i++) {
                if (i == 0 || places->items[i].low < places->items[i - 1].low) {
                        if (out)
                                out[count] = (struct segment){.low = places->items[i].low, .first = i};
                        count++;
                }
                if (out)
                        out[count - 1].count++;
        }
        return count;
}

int bs_thin_places_sort_by_key(struct bs_thin_places *places)
{
        size_t count = find_segments(places, NULL);
        _cleanup_free_ struct segment *segments = NULL;
        struct bs_thin_places sorted = {.count = 0};

        if (count < 2)
                return 0;
        segments = bs_realloc(NULL, count, sizeof(*segments));
        if (!segments || reserve(&sorted, places->count) < 0)
                return -ENOMEM;
        find_segments(places, segments);
        bs_sort_records(segments, count, sizeof(*segments), offsetof(struct segment, low));
        for (size_t i = 0; i < count; i++) {
                const struct segment *segment = &segments[i];

                memcpy(sorted.items + sorted.count, places->items + segment->first,
                       segment->count * sizeof(*sorted.items));
                sorted.count += segment->count;
        }
        bs_thin_places_deinit(places);
        *places = sorted;
        /* Nothing is left to do, unless segments overlap. */
        bs_sort_records(places->items, places->count, sizeof(*places->items),
                        offsetof(struct bs_thin_place, low));
        return 0;
}

/* A request, the places it is for, and how much of the buffer it takes. */
struct run {
        const struct bs_thin_place *places;
        size_t count;
        size_t blocks;
};

/*
 * Requests under way: a queue, and a buffer that is used in a circle. What is read is looked at in order,
 * while the reads behind it go on.
 */
struct pipeline {
        const struct bs_thin_batch *batch;
        const struct bs_thin_place *places; /* for which no request is planned yet */
        size_t left;
        struct bs_read reads[MAX_RUNS];
        struct run runs[MAX_RUNS];
        size_t first; /* the oldest request */
        size_t count;
        size_t buffer_end; /* where the next request's blocks go */
        size_t buffer_used;
};

/* How many of the places, sorted by block, one request can cover. */
static size_t run_length(const struct bs_thin_place *places, size_t count)
{
        size_t i = 1;

        while (i < count && places[i].block - places[i - 1].block <= RUN_GAP_BLOCKS &&
               places[i].block - places[0].block < RUN_BLOCKS)
                i++;
        return i;
}

/* Plan one more request; false when there are no more places, or is no more room. */
static bool plan_run(struct pipeline *pipeline)
{
        const struct bs_thin_place *places = pipeline->places;
        size_t at = (pipeline->first + pipeline->count) % MAX_RUNS;
        size_t begin = pipeline->buffer_end;
        size_t skipped = 0;

        if (pipeline->count == MAX_RUNS || pipeline->left == 0)
                return false;

        size_t count = run_length(places, pipeline->left);
        size_t blocks = (size_t)(places[count - 1].block - places[0].block) + 1;

        if (begin + blocks > BS_THIN_BATCH_BLOCKS) {
                skipped = BS_THIN_BATCH_BLOCKS - begin;
                begin = 0;
        }
        if (pipeline->buffer_used + skipped + blocks > BS_THIN_BATCH_BLOCKS)
                return false;
        pipeline->reads[at] = (struct bs_read){
                .offset = places[0].block * BS_THIN_BLOCK_SIZE,
                .buffer = pipeline->batch->buffer + begin * BS_THIN_BLOCK_SIZE,
                .length = blocks * BS_THIN_BLOCK_SIZE,
        };
        pipeline->runs[at] = (struct run){.places = places, .count = count, .blocks = skipped + blocks};
        pipeline->places += count;
        pipeline->left -= count;
        pipeline->count++;
        pipeline->buffer_end = begin + blocks;
        pipeline->buffer_used += skipped + blocks;
        return true;
}

/* Begin what there is room for, if that is many requests; whether it was. */
static bool refill(struct pipeline *pipeline)
{
        size_t before = pipeline->count;
        size_t from = (pipeline->first + before) % MAX_RUNS;

        if (before > 0 && before + FEW_RUNS > MAX_RUNS)
                return false;
        while (plan_run(pipeline))
                ;

        size_t more = pipeline->count - before;
        size_t to_the_end = more < MAX_RUNS - from ? more : MAX_RUNS - from;

        bs_read_start(pipeline->batch->reader, pipeline->reads + from, to_the_end);
        bs_read_start(pipeline->batch->reader, pipeline->reads, more - to_the_end);
        return more > 0;
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
                result = batch->reader->read(batch->reader->context, one.offset, one.buffer, one.length);
                if (result < 0)
                        return bs_fail_call(batch->error, batch->reader->call, result);
                result = visit_run(&one, &places[i], 1, visit, context);
        }
        return result;
}

/* Wait for the oldest request and visit its places. */
static int visit_oldest(struct pipeline *pipeline, bs_thin_visit_fn visit, void *context)
{
        const struct bs_thin_batch *batch = pipeline->batch;
        const struct run run = pipeline->runs[pipeline->first];
        struct bs_read *read = &pipeline->reads[pipeline->first];

        bs_read_finish(batch->reader, read);
        pipeline->first = (pipeline->first + 1) % MAX_RUNS;
        pipeline->count--;
        pipeline->buffer_used -= run.blocks;
        if (read->result == 0)
                return visit_run(read, run.places, run.count, visit, context);
        if (read->result == -EIO && read->length > BS_THIN_BLOCK_SIZE)
                return visit_blocks(batch, read, run.places, run.count, visit, context);
        return bs_fail_call(batch->error, batch->reader->call, read->result);
}

int bs_thin_visit(const struct bs_thin_batch *batch, const struct bs_thin_place *places, size_t count,
                  bs_thin_visit_fn visit, void *context)
{
        struct pipeline pipeline = {.batch = batch, .places = places, .left = count};
        int result = 0;

        refill(&pipeline);
        while (pipeline.count > 0 && result == 0) {
                result = visit_oldest(&pipeline, visit, context);
                if (result == 0 && refill(&pipeline))
                        result = bs_interrupted(batch->interrupt);
        }
        /* The buffer is the kernel's until all reads are over. */
        for (; pipeline.count > 0; pipeline.count--) {
                bs_read_finish(batch->reader, &pipeline.reads[pipeline.first]);
                pipeline.first = (pipeline.first + 1) % MAX_RUNS;
        }
        return result;
}

int bs_thin_visit_all(const struct bs_thin_batch *batch, struct bs_thin_places *places,
                      bs_thin_visit_fn visit, void *context)
{
        bs_thin_places_sort_by_block(places);
        return bs_thin_visit(batch, places->items, places->count, visit, context);
}
