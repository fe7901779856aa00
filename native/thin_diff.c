/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_diff.h"

#include "cleanup.h"
#include "thin_merge.h"
#include "thin_nodes.h"

enum {
        MAPPING_VALUE_SIZE = 8,
#ifdef BS_TEST_FRONTIER_LIMIT
        PART_PLACES = BS_TEST_FRONTIER_LIMIT,
#else
        /* Places of one window. The leaves among them hold up to 252 mappings of 16 bytes each. */
        PART_PLACES = 1000,
#endif
        /* Beside those that begin in a part, one of each tree may reach into it. */
        WINDOW_PLACES = PART_PLACES + 8,
        /* One tree may be held back until the other, deeper one has caught up. */
        MAX_STEPS = 2 * BS_THIN_MAX_DEPTH,
};

/* Chunks [first, last]. */
struct window {
        uint64_t first;
        uint64_t last;
};

/* What is yet to be looked at of one tree. */
struct frontier {
        struct bs_thin_places nodes;
        struct bs_thin_places leaves; /* known to be leaves, because they were read once */
};

struct walk {
        const struct bs_thin_diff *request;
        struct bs_thin_batch batch;
        struct bs_thin_diff_result *result;
        uint64_t metadata_blocks;
        uint64_t allowance[2]; /* nodes of a tree that may still be read */
        unsigned hold[2];      /* steps for which a tree waits */
        struct bs_thin_mappings found[2];
        uint64_t only[2]; /* mappings in one tree alone */
        /* Of the step that is going on: */
        const struct window *window;
        unsigned side;
        struct bs_thin_places *children;
        struct bs_thin_places *leaves;
};

void bs_thin_diff_result_deinit(struct bs_thin_diff_result *result)
{
        bs_extents_deinit(&result->changed);
        bs_extents_deinit(&result->discarded);
}

static void frontiers_deinit(struct frontier (*frontiers)[2])
{
        for (unsigned side = 0; side < 2; side++) {
                bs_thin_places_deinit(&(*frontiers)[side].nodes);
                bs_thin_places_deinit(&(*frontiers)[side].leaves);
        }
}

static size_t count_places(const struct frontier frontiers[2])
{
        return frontiers[0].nodes.count + frontiers[0].leaves.count + frontiers[1].nodes.count +
               frontiers[1].leaves.count;
}

/*
 * Drop the blocks that are in both lists, each sorted by key, at the same place. At another place a block
 * means the same only in trees that are sound, and it is hardly ever met there: where the kernel has removed
 * the node behind it.
 */
static void cancel(struct bs_thin_places *one, struct bs_thin_places *other)
{
        size_t i = 0, j = 0, kept_i = 0, kept_j = 0;

        while (i < one->count && j < other->count) {
                const struct bs_thin_place *a = &one->items[i];
                const struct bs_thin_place *b = &other->items[j];

                if (a->low == b->low && a->last == b->last && a->block == b->block) {
                        i++;
                        j++;
                } else if (a->low <= b->low) {
                        one->items[kept_i++] = one->items[i++];
                } else {
                        other->items[kept_j++] = other->items[j++];
                }
        }
        while (i < one->count)
                one->items[kept_i++] = one->items[i++];
        while (j < other->count)
                other->items[kept_j++] = other->items[j++];
        one->count = kept_i;
        other->count = kept_j;
}

static int cancel_shared(struct frontier frontiers[2])
{
        int result = 0;

        for (unsigned side = 0; side < 2 && result == 0; side++) {
                result = bs_thin_places_sort_by_key(&frontiers[side].nodes);
                if (result == 0)
                        result = bs_thin_places_sort_by_key(&frontiers[side].leaves);
        }
        if (result < 0)
                return result;
        cancel(&frontiers[0].nodes, &frontiers[1].nodes);
        cancel(&frontiers[0].leaves, &frontiers[1].leaves);
        cancel(&frontiers[0].nodes, &frontiers[1].leaves);
        cancel(&frontiers[0].leaves, &frontiers[1].nodes);
        return 0;
}

static bool overlaps(const struct bs_thin_place *place, const struct window *window)
{
        return place->low <= window->last && place->last >= window->first;
}

static int take_children(struct walk *walk, const struct bs_thin_node *node,
                         const struct bs_thin_place *place)
{
        int result = 0;

        for (uint32_t i = 0; i < node->count && result == 0; i++) {
                struct bs_thin_place child = bs_thin_child(node, place, i);

                if (!overlaps(&child, walk->window))
                        continue;
                result = bs_thin_block_check(child.block, walk->metadata_blocks, walk->batch.error);
                if (result == 0)
                        result = bs_thin_places_add(walk->children, &child);
        }
        return result;
}

static int visit(void *context, const uint8_t *block, const struct bs_thin_place *place)
{
        struct walk *walk = context;
        struct bs_thin_node node;
        int result = bs_thin_node_parse(block, place, MAPPING_VALUE_SIZE, walk->batch.error, &node);

        if (result < 0)
                return result;
        if (walk->allowance[walk->side]-- == 0)
                return bs_fail_block(walk->batch.error, place->block,
                                     "a btree has more nodes than the metadata has blocks");
        walk->result->nodes++;
        if (!node.leaf)
                return take_children(walk, &node, place);
        result = bs_thin_mappings_add(&walk->found[walk->side], &node, walk->window->first,
                                      walk->window->last);
        return result < 0 ? result : bs_thin_places_add(walk->leaves, place);
}

static int read_places(struct walk *walk, unsigned side, struct bs_thin_places *places,
                       struct bs_thin_places *children, struct bs_thin_places *leaves)
{
        walk->side = side;
        walk->children = children;
        walk->leaves = leaves;
        return bs_thin_visit_all(&walk->batch, places, visit, walk);
}

/* Compare the mappings of a window, all of which have been read. */
static int merge_window(struct walk *walk)
{
        struct bs_thin_merge merge = {
                .chunk_size = walk->result->device.superblock.chunk_size,
                .first_chunk = walk->request->first_chunk,
                .end_chunk = walk->request->end_chunk,
                .changed = &walk->result->changed,
                .discarded = &walk->result->discarded,
        };
        int result = bs_thin_merge(&merge, &walk->found[0], &walk->found[1]);

        walk->only[0] += merge.only[0];
        walk->only[1] += merge.only[1];
        return result;
}

/*
 * Read the nodes of both trees and go down a level; `*out` tells that there was none below, and that the
 * window is done. A leaf that is met while the other tree still has levels to go is looked at again later:
 * there it may be shared.
 */
static int step(struct walk *walk, struct frontier frontiers[2], unsigned depth, bool *out)
{
        _cleanup_(frontiers_deinit) struct frontier next[2] = {{.nodes = {.count = 0}}};
        int result = 0;

        for (unsigned side = 0; side < 2 && result == 0; side++) {
                bs_thin_mappings_clear(&walk->found[side]);
                if (depth < walk->hold[side])
                        result = bs_thin_places_extend(&next[side].nodes, &frontiers[side].nodes);
                else
                        result = read_places(walk, side, &frontiers[side].nodes, &next[side].nodes,
                                             &next[side].leaves);
        }
        *out = next[0].nodes.count + next[1].nodes.count == 0;
        for (unsigned side = 0; side < 2 && result == 0; side++) {
                if (*out)
                        result = read_places(walk, side, &frontiers[side].leaves, &next[side].nodes,
                                             &next[side].leaves);
                else
                        result = bs_thin_places_extend(&next[side].leaves, &frontiers[side].leaves);
        }
        if (result < 0)
                return result;
        if (*out && next[0].nodes.count + next[1].nodes.count > 0)
                return bs_fail_block(walk->batch.error, walk->result->device.device.root,
                                     "a leaf became another node while it was read");
        if (*out)
                return merge_window(walk);

        struct frontier last[2] = {frontiers[0], frontiers[1]};

        memcpy(frontiers, next, sizeof(last));
        memcpy(next, last, sizeof(last));
        return 0;
}

static int walk_parts(struct walk *walk, const struct frontier frontiers[2], const struct window *window,
                      unsigned depth);

/* Compare what two trees have in a window. */
static int walk_window(struct walk *walk, struct frontier frontiers[2], const struct window *window,
                       unsigned depth)
{
        for (bool done = false; !done; depth++) {
                int result = cancel_shared(frontiers);

                if (result < 0 || count_places(frontiers) == 0)
                        return result;
                if (count_places(frontiers) > WINDOW_PLACES)
                        return walk_parts(walk, frontiers, window, depth);
                if (depth >= MAX_STEPS)
                        return bs_fail_block(walk->batch.error, walk->result->device.device.root,
                                             "a btree is too deep");
                walk->window = window;
                result = step(walk, frontiers, depth, &done);
                if (result < 0)
                        return result;
        }
        return 0;
}

/* Add the places that begin or reach into a window, from `at` on in a list sorted by key. */
static int take_part(const struct bs_thin_places *from, const struct window *window, size_t at,
                     struct bs_thin_places *to)
{
        for (size_t i = at; i < from->count && from->items[i].low <= window->last; i++) {
                int result = bs_thin_places_add(to, &from->items[i]);

                if (result < 0)
                        return result;
        }
        return 0;
}

static int walk_part(struct walk *walk, const struct frontier frontiers[2], const struct window *part,
                     unsigned depth, const size_t at[4])
{
        _cleanup_(frontiers_deinit) struct frontier mine[2] = {{.nodes = {.count = 0}}};
        int result = 0;

        for (unsigned side = 0; side < 2 && result == 0; side++) {
                /* A node that reaches into two parts is read for both, and so may be those below it. */
                walk->allowance[side] += BS_THIN_MAX_DEPTH;
                result = take_part(&frontiers[side].nodes, part, at[2 * side], &mine[side].nodes);
                if (result == 0)
                        result = take_part(&frontiers[side].leaves, part, at[2 * side + 1],
                                           &mine[side].leaves);
        }
        return result < 0 ? result : walk_window(walk, mine, part, depth);
}

/*
 * Find where a part ends that begins at `first` and has PART_PLACES places in it, of four lists sorted by
 * key:
 * `*out` is the first key after it. False when there are no more than that. `at` is moved to where the part
 * begins in each list. A tree's places do not overlap, so that the end is beyond `first`.
 */
static bool end_of_part(const struct bs_thin_places *const lists[4], uint64_t first, size_t at[4],
                        uint64_t *out)
{
        size_t next[4];

        for (unsigned i = 0; i < 4; i++) {
                while (at[i] < lists[i]->count && lists[i]->items[at[i]].last < first)
                        at[i]++;
                next[i] = at[i];
        }
        for (size_t taken = 0; taken <= PART_PLACES; taken++) {
                unsigned lowest = 4;

                for (unsigned i = 0; i < 4; i++)
                        if (next[i] < lists[i]->count &&
                            (lowest == 4 || lists[i]->items[next[i]].low < *out)) {
                                lowest = i;
                                *out = lists[i]->items[next[i]].low;
                        }
                if (lowest == 4)
                        return false;
                next[lowest]++;
        }
        return *out > first;
}

/* Cut a window in which there is too much, sorted by key, into parts, and compare one after another, in
 * order. */
static int walk_parts(struct walk *walk, const struct frontier frontiers[2], const struct window *window,
                      unsigned depth)
{
        const struct bs_thin_places *const lists[4] = {&frontiers[0].nodes, &frontiers[0].leaves,
                                                       &frontiers[1].nodes, &frontiers[1].leaves};
        struct window part = {.first = window->first};
        size_t at[4] = {0};
        int result = 0;

        for (bool more = true; more && result == 0; part.first = part.last + 1) {
                uint64_t next = 0;

                more = end_of_part(lists, part.first, at, &next) && next <= window->last;
                part.last = more ? next - 1 : window->last;
                result = walk_part(walk, frontiers, &part, depth, at);
        }
        return result;
}

/* How deep a tree is along its first or last children. */
static int measure_edge(struct walk *walk, uint64_t root, bool along_last, unsigned *out)
{
        struct bs_thin_place place = {.block = root, .low = 0, .last = UINT64_MAX};
        struct bs_thin_node node;

        for (*out = 1; *out <= BS_THIN_MAX_DEPTH; ++*out) {
                struct bs_read read = {
                        .offset = place.block * BS_THIN_BLOCK_SIZE,
                        .buffer = walk->batch.buffer,
                        .length = BS_THIN_BLOCK_SIZE,
                };

                bs_read_many(walk->batch.reader, &read, 1);
                if (read.result < 0)
                        return bs_fail_call(walk->batch.error, walk->batch.reader->call, read.result);

                int result = bs_thin_node_parse(walk->batch.buffer, &place, MAPPING_VALUE_SIZE,
                                                walk->batch.error, &node);

                if (result < 0 || node.leaf)
                        return result;
                place = bs_thin_child(&node, &place, along_last ? node.count - 1 : 0);
                result = bs_thin_block_check(place.block, walk->metadata_blocks, walk->batch.error);
                if (result < 0)
                        return result;
        }
        return bs_fail_block(walk->batch.error, root, "a btree is too deep");
}

/*
 * Shared subtrees meet when both trees are walked at the same height, so a tree that has more levels, since
 * its root was split, begins earlier. Both edges are looked at: one of them may be a level short, when the
 * kernel has lifted an only child into its parent.
 */
static int align_heights(struct walk *walk, const uint64_t roots[2])
{
        unsigned depth[2] = {0};

        for (unsigned side = 0; side < 2; side++) {
                for (unsigned edge = 0; edge < 2; edge++) {
                        unsigned found = 0;
                        int result = measure_edge(walk, roots[side], edge, &found);

                        if (result < 0)
                                return result;
                        if (found > depth[side])
                                depth[side] = found;
                }
        }
        walk->hold[0] = depth[1] > depth[0] ? depth[1] - depth[0] : 0;
        walk->hold[1] = depth[0] > depth[1] ? depth[0] - depth[1] : 0;
        return 0;
}

static int walk_trees(struct walk *walk, const struct window *window)
{
        const struct bs_thin_diff_result *result = walk->result;
        bool has_base = walk->request->base_id != BS_THIN_NO_DEVICE;
        const uint64_t roots[2] = {result->base.device.root, result->device.device.root};
        _cleanup_(frontiers_deinit) struct frontier frontiers[2] = {{.nodes = {.count = 0}}};
        int status = 0;

        if (has_base && roots[0] == roots[1])
                return 0;
        for (unsigned side = has_base ? 0 : 1; side < 2 && status == 0; side++) {
                struct bs_thin_place root = {.block = roots[side], .low = 0, .last = UINT64_MAX};

                /* A leaf may be read a second time, when the other tree is a level deeper there. */
                walk->allowance[side] = 2 * walk->metadata_blocks;
                status = bs_thin_places_add(&frontiers[side].nodes, &root);
        }
        if (status == 0 && has_base)
                status = align_heights(walk, roots);
        return status < 0 ? status : walk_window(walk, frontiers, window, 0);
}

static void walk_deinit(struct walk *walk)
{
        bs_thin_mappings_deinit(&walk->found[0]);
        bs_thin_mappings_deinit(&walk->found[1]);
}

static int compare_devices(const struct bs_reader *reader, const struct bs_thin_diff *request,
                           const struct bs_interrupt *interrupt, struct bs_error *error,
                           struct bs_thin_diff_result *out)
{
        const struct window everything = {.first = 0, .last = UINT64_MAX};
        const struct window range = {.first = request->first_chunk, .last = request->end_chunk - 1};
        bool whole = request->base_id != BS_THIN_NO_DEVICE || request->first_chunk == 0;
        _cleanup_free_ uint8_t *buffer = bs_alloc_aligned(BS_THIN_BATCH_BLOCKS * BS_THIN_BLOCK_SIZE);
        _cleanup_(walk_deinit) struct walk walk = {
                .request = request,
                .batch = {reader, interrupt, error, buffer},
                .result = out,
                .metadata_blocks = out->device.superblock.metadata_blocks,
        };

        if (!buffer)
                return -ENOMEM;
        if (request->first_chunk >= request->end_chunk)
                return 0;

        int result = walk_trees(&walk, whole ? &everything : &range);

        if (result < 0)
                return result;
        if (whole &&
            out->base.device.mapped_blocks - walk.only[0] + walk.only[1] != out->device.device.mapped_blocks)
                return bs_fail_block(
                        error, out->device.device.root,
                        "the trees do not differ by as many mappings as the devices' details say");
        return 0;
}

static int find(const struct bs_reader *reader, uint64_t held_root, uint64_t device_id,
                const struct bs_interrupt *interrupt, struct bs_error *error, uint64_t *missing,
                struct bs_thin_view *out)
{
        *missing = device_id;
        return bs_thin_find(reader, held_root, device_id, interrupt, error, out);
}

int bs_thin_diff(const struct bs_reader *reader, const struct bs_thin_diff *request,
                 const struct bs_interrupt *interrupt, struct bs_error *error, uint64_t *missing,
                 struct bs_thin_diff_result *out)
{
        bool has_base = request->base_id != BS_THIN_NO_DEVICE;
        uint64_t held = request->held_root;
        uint64_t size;
        int result;

        *out = (struct bs_thin_diff_result){.nodes = 0};
        result = find(reader, held, request->device_id, interrupt, error, missing, &out->device);
        if (result == 0 && has_base)
                result = find(reader, held, request->base_id, interrupt, error, missing, &out->base);
        if (result == 0 &&
            __builtin_mul_overflow(request->end_chunk, out->device.superblock.chunk_size, &size))
                result = bs_fail_range(error, "the volume is larger than 2^64 bytes");
        if (result == 0)
                result = compare_devices(reader, request, interrupt, error, out);
        if (result == 0)
                result = bs_thin_check_unchanged(reader, held, request->device_id, &out->device.device,
                                                 interrupt, error);
        if (result == 0 && has_base)
                result = bs_thin_check_unchanged(reader, held, request->base_id, &out->base.device, interrupt,
                                                 error);
        return result;
}
