/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_scan.h"

#include "bitmap.h"
#include "cleanup.h"
#include "thin_nodes.h"

enum {
        MAPPING_VALUE_SIZE = 8,
#ifdef BS_TEST_FRONTIER_LIMIT
        STEP = BS_TEST_FRONTIER_LIMIT,
#else
        /* Nodes that are looked at before those below them: these can be a million. */
        STEP = 4096,
#endif
};

struct walk {
        const struct bs_reader *reader;
        const struct bs_thin_scan *scan;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        struct bs_thin_scan_result *result;
        uint8_t *visited;                /* one bit a metadata block */
        uint8_t *buffer;                 /* BS_THIN_BATCH_BLOCKS blocks */
        struct bs_thin_places *children; /* of the level that is being read */
};

/*
 * Queue a node. Each block is in a tree once: a second visit is a cycle or two parents, and refusing it
 * bounds both the walk and the memory by the size of the metadata.
 */
static int enqueue(struct walk *walk, const struct bs_thin_place *place, struct bs_thin_places *to)
{
        int result =
                bs_thin_block_check(place->block, walk->result->view.superblock.metadata_blocks, walk->error);

        if (result < 0)
                return result;
        if (bs_bitmap_test_and_set(walk->visited, place->block))
                return bs_fail_block(walk->error, place->block, "a block is twice in the same btree");
        return bs_thin_places_add(to, place);
}

/* How many chunks of a leaf, from `begin` on and before `end`, follow one another. */
static uint32_t run_length(const struct bs_thin_node *leaf, uint32_t begin, uint32_t end)
{
        uint32_t i = begin + 1;

        /* Keys ascend, so that their ends tell of all between them. */
        if (bs_thin_key(leaf, end - 1) - bs_thin_key(leaf, begin) == end - 1 - begin)
                return end - begin;
        while (i < end && bs_thin_key(leaf, i) - bs_thin_key(leaf, i - 1) == 1)
                i++;
        return i - begin;
}

/* The last chunk whose mapping is counted. */
static uint64_t last_chunk(const struct bs_thin_scan *scan)
{
        return scan->more ? scan->first + scan->nr_chunks - 1 : UINT64_MAX;
}

static void take_mappings(const struct bs_thin_scan *scan, const struct bs_thin_node *leaf,
                          uint64_t *mappings)
{
        uint32_t begin = 0;
        uint32_t count = leaf->count;

        while (count > 0 && bs_thin_key(leaf, count - 1) > last_chunk(scan))
                count--;
        while (begin < count && bs_thin_key(leaf, begin) < scan->first)
                begin++;
        *mappings += count - begin;
        while (count > begin && bs_thin_key(leaf, count - 1) - scan->first >= scan->nr_chunks)
                count--;
        for (uint32_t i = begin, length; i < count; i += length) {
                length = run_length(leaf, i, count);
                bs_bitmap_fill(scan->mapped, bs_thin_key(leaf, i) - scan->first, length, true);
        }
        if (!scan->changed)
                return;
        for (uint32_t i = begin; i < count; i++)
                if ((bs_thin_value(leaf, i) & BS_THIN_MAX_24_BITS) >= scan->since)
                        bs_bitmap_set(scan->changed, bs_thin_key(leaf, i) - scan->first);
}

static int visit(void *context, const uint8_t *block, const struct bs_thin_place *place)
{
        struct walk *walk = context;
        struct bs_thin_node node;
        int result = bs_thin_node_parse(block, place, MAPPING_VALUE_SIZE, walk->error, &node);

        if (result < 0)
                return result;
        walk->result->nodes++;
        if (node.leaf) {
                take_mappings(walk->scan, &node, &walk->result->mappings);
                return 0;
        }
        for (uint32_t i = 0; i < node.count && result == 0; i++) {
                struct bs_thin_place child = bs_thin_child(&node, place, i);

                if (child.last >= walk->scan->first && child.low <= last_chunk(walk->scan))
                        result = enqueue(walk, &child, walk->children);
        }
        return result;
}

/*
 * Visit the nodes of a level, and those below them. Leaves may be at any level: the kernel makes a subtree
 * shorter than its siblings when it lifts an only child into its parent.
 */
static int walk_level(struct walk *walk, struct bs_thin_places *level, unsigned depth)
{
        const struct bs_thin_batch batch = {walk->reader, walk->interrupt, walk->error, walk->buffer};
        _cleanup_(bs_thin_places_deinit) struct bs_thin_places children = {.count = 0};

        if (depth >= BS_THIN_MAX_DEPTH)
                return bs_fail_block(walk->error, level->items[0].block, "a btree is too deep");
        bs_thin_places_sort_by_block(level);
        for (size_t at = 0; at < level->count; at += STEP) {
                size_t left = level->count - at;

                walk->children = &children;

                int result = bs_thin_visit(&batch, level->items + at, left < STEP ? left : STEP, visit, walk);

                if (result == 0 && children.count > 0)
                        result = walk_level(walk, &children, depth + 1);
                if (result < 0)
                        return result;
                children.count = 0;
        }
        return 0;
}

static int walk_tree(struct walk *walk)
{
        const struct bs_thin_view *view = &walk->result->view;
        struct bs_thin_place root = {.block = view->device.root, .low = 0, .last = UINT64_MAX};
        uint64_t visited_bytes = bs_bitmap_bytes(view->superblock.metadata_blocks);
        _cleanup_free_ uint8_t *visited = NULL;
        _cleanup_free_ uint8_t *buffer = bs_alloc_aligned(BS_THIN_BATCH_BLOCKS * BS_THIN_BLOCK_SIZE);
        _cleanup_(bs_thin_places_deinit) struct bs_thin_places level = {.count = 0};

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
        uint64_t end, size;

        if (scan->more && scan->nr_chunks == 0)
                return bs_fail_range(error, "a window of no chunks");
        if (scan->since > superblock->time)
                return bs_fail_range(error, "the pool's time is before the given one: not the same pool");
        /* Mappings keep only 24 bits of it, so comparing would mean nothing. */
        if (scan->since > 0 && superblock->time > BS_THIN_MAX_24_BITS)
                return bs_fail_block(error, 0, "the pool's time has outgrown its mappings");
        if (__builtin_add_overflow(scan->first, scan->nr_chunks, &end) ||
            __builtin_mul_overflow(end, superblock->chunk_size, &size))
                return bs_fail_range(error, "the volume is larger than 2^64 bytes");
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

        int result = bs_thin_find(reader, scan->held_root, scan->device_id, interrupt, error, &out->view);

        if (result == 0)
                result = check_request(scan, &out->view.superblock, error);
        if (result == 0)
                result = walk_tree(&walk);
        if (result == 0)
                result = bs_thin_check_unchanged(reader, scan->held_root, scan->device_id, &out->view.device,
                                                 interrupt, error);
        if (result < 0)
                return result;
        if (scan->first == 0 && !scan->more && out->mappings != out->view.device.mapped_blocks)
                return bs_fail_block(error, out->view.device.root,
                                     "the tree does not hold as many mappings as the device's details say");
        return 0;
}
