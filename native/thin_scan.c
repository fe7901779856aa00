/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_scan.h"

#include "bitmap.h"
#include "cleanup.h"

#include <stdlib.h>

enum {
        MAPPING_VALUE_SIZE = 8,
        /* Blocks of one read. */
        RUN_BLOCKS = 256,
        /* Reading this many blocks in vain is cheaper than another request. */
        RUN_GAP_BLOCKS = 32,
#ifdef BS_TEST_FRONTIER_LIMIT
        FRONTIER_LIMIT = BS_TEST_FRONTIER_LIMIT,
#else
        /* Places yet to be read at one level, above which the level below is walked first. */
        FRONTIER_LIMIT = 1 << 20,
#endif
};

/* Places of nodes yet to be read. */
struct frontier {
        struct bs_thin_place *places;
        size_t count;
        size_t capacity;
};

struct walk {
        const struct bs_reader *reader;
        const struct bs_thin_scan *scan;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        struct bs_thin_scan_result *result;
        uint8_t *visited; /* one bit a metadata block */
        uint8_t *buffer;  /* RUN_BLOCKS blocks */
};

static void frontier_deinit(struct frontier *frontier)
{
        bs_free(frontier->places);
}

static int frontier_add(struct frontier *frontier, const struct bs_thin_place *place)
{
        if (frontier->count == frontier->capacity) {
                size_t capacity = frontier->capacity ? frontier->capacity * 2 : 256;
                struct bs_thin_place *places = bs_realloc(frontier->places, capacity, sizeof(*places));

                if (!places)
                        return -ENOMEM;
                frontier->places = places;
                frontier->capacity = capacity;
        }
        frontier->places[frontier->count++] = *place;
        return 0;
}

static int compare_blocks(const void *left, const void *right)
{
        uint64_t a = ((const struct bs_thin_place *)left)->block;
        uint64_t b = ((const struct bs_thin_place *)right)->block;

        return (a > b) - (a < b);
}

static void frontier_sort(struct frontier *frontier)
{
        size_t i = 1;

        while (i < frontier->count && frontier->places[i - 1].block < frontier->places[i].block)
                i++;
        /* Pools that were filled in order are in order. */
        if (i < frontier->count)
                qsort(frontier->places, frontier->count, sizeof(*frontier->places), compare_blocks);
}

/*
 * Queue a node. Each block is in a tree once: a second visit is a cycle or two parents, and refusing it
 * bounds both the walk and the memory by the size of the metadata.
 */
static int enqueue(struct walk *walk, const struct bs_thin_place *place, struct frontier *to)
{
        int result =
                bs_thin_block_check(place->block, walk->result->view.superblock.metadata_blocks, walk->error);

        if (result < 0)
                return result;
        if (bs_bitmap_test_and_set(walk->visited, place->block))
                return bs_fail_block(walk->error, place->block, "a block is twice in the same btree");
        return frontier_add(to, place);
}

static void take_mappings(const struct bs_thin_scan *scan, const struct bs_thin_node *leaf)
{
        for (uint32_t i = 0; i < leaf->count; i++) {
                uint64_t chunk = bs_thin_key(leaf, i);

                /* Keys ascend. */
                if (chunk >= scan->nr_chunks)
                        return;
                bs_bitmap_set(scan->mapped, chunk);
                if (scan->changed && (bs_thin_value(leaf, i) & BS_THIN_MAX_24_BITS) >= scan->since)
                        bs_bitmap_set(scan->changed, chunk);
        }
}

static int visit(struct walk *walk, const uint8_t *block, const struct bs_thin_place *place,
                 struct frontier *children)
{
        struct bs_thin_node node;
        int result = bs_thin_node_parse(block, place, MAPPING_VALUE_SIZE, walk->error, &node);

        if (result < 0)
                return result;
        walk->result->nodes++;
        if (node.leaf) {
                walk->result->mappings += node.count;
                take_mappings(walk->scan, &node);
                return 0;
        }
        for (uint32_t i = 0; i < node.count && result == 0; i++) {
                struct bs_thin_place child = bs_thin_child(&node, place, i);

                result = enqueue(walk, &child, children);
        }
        return result;
}

/* How many of the places, sorted by block, one read can cover. */
static size_t run_length(const struct bs_thin_place *places, size_t count)
{
        size_t i = 1;

        while (i < count && places[i].block - places[i - 1].block <= RUN_GAP_BLOCKS &&
               places[i].block - places[0].block < RUN_BLOCKS)
                i++;
        return i;
}

static int read_blocks(const struct walk *walk, uint64_t first, uint64_t count)
{
        int result = walk->reader->read(walk->reader->context, first * BS_THIN_BLOCK_SIZE, walk->buffer,
                                        (size_t)count * BS_THIN_BLOCK_SIZE);

        return result < 0 ? bs_fail_call(walk->error, walk->reader->call, result) : 0;
}

/* Read `count` places in one request and visit them. */
static int visit_run(struct walk *walk, const struct bs_thin_place *places, size_t count,
                     struct frontier *children)
{
        uint64_t first = places[0].block;
        int result = read_blocks(walk, first, places[count - 1].block - first + 1);

        for (size_t i = 0; i < count && result == 0; i++)
                result = visit(walk, walk->buffer + (places[i].block - first) * BS_THIN_BLOCK_SIZE,
                               &places[i], children);
        return result;
}

/* Visit a run; if it cannot be read as a whole, block by block: the bad sector may be in a gap. */
static int visit_run_or_blocks(struct walk *walk, const struct bs_thin_place *places, size_t count,
                               struct frontier *children)
{
        int result = visit_run(walk, places, count, children);

        if (result != -EIO || count == 1)
                return result;
        result = 0;
        for (size_t i = 0; i < count && result == 0; i++)
                result = visit_run(walk, &places[i], 1, children);
        return result;
}

/*
 * Visit all nodes of a level, then those below. Leaves may be at any level: the kernel makes a subtree
 * shorter than its siblings when it lifts an only child into its parent.
 */
static int walk_level(struct walk *walk, struct frontier *level, unsigned depth)
{
        _cleanup_(frontier_deinit) struct frontier children = {.count = 0};

        if (depth >= BS_THIN_MAX_DEPTH)
                return bs_fail_block(walk->error, level->places[0].block, "a btree is too deep");
        frontier_sort(level);
        for (size_t at = 0; at < level->count;) {
                size_t count = run_length(&level->places[at], level->count - at);
                int result = visit_run_or_blocks(walk, &level->places[at], count, &children);

                if (result == 0)
                        result = bs_interrupted(walk->interrupt);
                at += count;
                if (result == 0 && children.count > 0 &&
                    (at == level->count || children.count >= FRONTIER_LIMIT)) {
                        result = walk_level(walk, &children, depth + 1);
                        children.count = 0;
                }
                if (result < 0)
                        return result;
        }
        return 0;
}

static int walk_tree(struct walk *walk)
{
        const struct bs_thin_view *view = &walk->result->view;
        struct bs_thin_place root = {.block = view->device.root, .low = 0, .last = UINT64_MAX};
        uint64_t visited_bytes = bs_bitmap_bytes(view->superblock.metadata_blocks);
        _cleanup_free_ uint8_t *visited = NULL;
        _cleanup_free_ uint8_t *buffer = bs_alloc_aligned(RUN_BLOCKS * BS_THIN_BLOCK_SIZE);
        _cleanup_(frontier_deinit) struct frontier level = {.count = 0};

        if (visited_bytes <= SIZE_MAX)
                visited = bs_alloc_zeroed((size_t)visited_bytes);
        if (!visited || !buffer)
                return -ENOMEM;
        walk->visited = visited;
        walk->buffer = buffer;

        int result = enqueue(walk, &root, &level);

        return result < 0 ? result : walk_level(walk, &level, 0);
}

static int check_request(const struct bs_thin_scan *scan, const struct bs_thin_superblock *superblock,
                         struct bs_error *error)
{
        uint64_t size;

        if (scan->since > superblock->time)
                return bs_fail_range(error, "the pool's time is before the given one: not the same pool");
        /* Mappings keep only 24 bits of it, so comparing would mean nothing. */
        if (scan->since > 0 && superblock->time > BS_THIN_MAX_24_BITS)
                return bs_fail_block(error, 0, "the pool's time has outgrown its mappings");
        if (__builtin_mul_overflow(scan->nr_chunks, superblock->chunk_size, &size))
                return bs_fail_range(error, "the volume is larger than 2^64 bytes");
        return 0;
}

/* Make sure that the tree just walked is still the device's: then no node of it was reused meanwhile. */
static int check_unchanged(const struct walk *walk)
{
        const struct bs_thin_device *then = &walk->result->view.device;
        struct bs_thin_view now;
        int result = bs_thin_find(walk->reader, walk->scan->device_id, walk->interrupt, walk->error, &now);

        if (result < 0 && result != -ENOKEY)
                return result;
        if (result == -ENOKEY || now.device.root != then->root ||
            now.device.mapped_blocks != then->mapped_blocks ||
            now.device.transaction_id != then->transaction_id ||
            now.device.creation_time != then->creation_time)
                return bs_fail_block(walk->error, then->root, "the device changed while it was read");
        return 0;
}

int bs_thin_scan(const struct bs_reader *reader, const struct bs_thin_scan *scan,
                 const struct bs_interrupt *interrupt, struct bs_error *error,
                 struct bs_thin_scan_result *out)
{
        struct walk walk = {
                .reader = reader,
                .scan = scan,
                .interrupt = interrupt,
                .error = error,
                .result = out,
        };

        *out = (struct bs_thin_scan_result){.nodes = 0};

        int result = bs_thin_find(reader, scan->device_id, interrupt, error, &out->view);

        if (result == 0)
                result = check_request(scan, &out->view.superblock, error);
        if (result == 0)
                result = walk_tree(&walk);
        if (result == 0)
                result = check_unchanged(&walk);
        if (result < 0)
                return result;
        if (out->mappings != out->view.device.mapped_blocks)
                return bs_fail_block(error, out->view.device.root,
                                     "the tree does not hold as many mappings as the device's details say");
        return 0;
}
