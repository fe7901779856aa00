/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_extents.h"

#include <string.h>

#define NO_EDGE UINT64_MAX

enum { COMPRESSION_MAX = 7 };

void bs_btrfs_tree_extents_init(struct bs_btrfs_cursor *cursor, uint64_t inode, uint32_t block,
                                struct bs_bytes *remember, struct bs_btrfs_tree_extents *out)
{
        *out = (struct bs_btrfs_tree_extents){
                .cursor = cursor,
                .inode = inode,
                .block = block,
                .remember = remember,
        };
        if (remember)
                bs_btrfs_state_begin(remember, block, &out->place);
}

static int check_extent(struct bs_btrfs_tree_extents *extents, const struct bs_btrfs_extent *extent)
{
        if (extent->begin < extents->end)
                return bs_fail_block(extents->cursor->error, extents->inode, "two extents overlap");
        if (extent->compression > COMPRESSION_MAX)
                return bs_fail_block(extents->cursor->error, extents->inode,
                                     "an extent is compressed in a way we do not know");
        return 0;
}

static int next_in_tree(void *context, struct bs_btrfs_extent *out)
{
        struct bs_btrfs_tree_extents *extents = context;
        struct bs_btrfs_cursor *cursor = extents->cursor;
        const struct bs_btrfs_item *item;

        for (;;) {
                int result;

                /* What was returned last time points into the item: it is left behind only now. */
                if (extents->began)
                        bs_btrfs_advance(cursor);
                result = bs_btrfs_peek(cursor, &item);
                if (result < 0)
                        return result;
                extents->began = item && item->key.objectid == extents->inode &&
                                 item->key.type == BS_BTRFS_EXTENT_DATA;
                if (!extents->began) {
                        *out = (struct bs_btrfs_extent){.kind = BS_BTRFS_HOLE};
                        return 0;
                }
                result = bs_btrfs_extent_parse(item, extents->block, cursor->error, out);
                if (result == 0)
                        result = check_extent(extents, out);
                if (result < 0)
                        return result;
                extents->end = out->end;
                if (out->kind != BS_BTRFS_HOLE)
                        break;
        }
        extents->allocated += out->end - out->begin;
        extents->has_inline |= out->kind == BS_BTRFS_INLINE;
        if (extents->remember)
                bs_btrfs_state_add(extents->remember, &extents->place, out);
        return 0;
}

struct bs_btrfs_extent_source bs_btrfs_tree_source(struct bs_btrfs_tree_extents *extents)
{
        return (struct bs_btrfs_extent_source){.next = next_in_tree, .context = extents};
}

void bs_btrfs_unknown_extents_init(struct bs_btrfs_state_extents *out)
{
        *out = (struct bs_btrfs_state_extents){.unknown = true};
}

void bs_btrfs_state_extents_init(const struct bs_span *state, uint32_t block,
                                 struct bs_btrfs_state_extents *out)
{
        *out = (struct bs_btrfs_state_extents){.span = *state};
        if (state->left > 0 &&
            (!bs_btrfs_state_is_valid(state, block) || !bs_btrfs_state_open(&out->span, block, &out->place)))
                bs_btrfs_unknown_extents_init(out);
}

static int next_in_state(void *context, struct bs_btrfs_extent *out)
{
        struct bs_btrfs_state_extents *extents = context;

        *out = (struct bs_btrfs_extent){.kind = BS_BTRFS_HOLE};
        if (extents->unknown) {
                /* Inline data that nobody knows is like no other, and zeros that replace it are a hole. */
                *out = (struct bs_btrfs_extent){.kind = BS_BTRFS_INLINE, .end = INT64_MAX};
                extents->unknown = false;
                extents->span.left = 0;
                return 0;
        }
        if (extents->span.left > 0 && !bs_btrfs_state_take(&extents->span, &extents->place, out))
                return -EINVAL;
        return 0;
}

struct bs_btrfs_extent_source bs_btrfs_state_source(struct bs_btrfs_state_extents *extents)
{
        return (struct bs_btrfs_extent_source){.next = next_in_state, .context = extents};
}

/* One side of the comparison: the extent at or after the present position, cut where the file's last block
 * ends. */
struct side {
        const struct bs_btrfs_extent_source *source;
        struct bs_btrfs_extent extent;
        uint64_t limit;
        bool ended;
};

struct walk {
        struct side old;
        struct side present;
        uint64_t edges[2]; /* where the blocks begin that count as changed, or NO_EDGE */
        uint64_t size;
        uint32_t block;
        struct bs_extents *changed;
        struct bs_extents *holes;
};

/* Go on until the extent ends after `position`. */
static int side_reach(struct side *side, uint64_t position)
{
        while (!side->ended && side->extent.end <= position) {
                int result = side->source->next(side->source->context, &side->extent);

                if (result < 0)
                        return result;
                side->ended = side->extent.kind == BS_BTRFS_HOLE || side->extent.begin >= side->limit;
                if (side->extent.end > side->limit)
                        side->extent.end = side->limit;
        }
        return 0;
}

static int side_finish(struct side *side)
{
        while (side->extent.kind != BS_BTRFS_HOLE) {
                int result = side->source->next(side->source->context, &side->extent);

                if (result < 0)
                        return result;
        }
        return 0;
}

static const struct bs_btrfs_extent *side_at(const struct side *side, uint64_t position)
{
        return !side->ended && side->extent.begin <= position ? &side->extent : NULL;
}

/* The next place after `position` where this side may say something else. */
static uint64_t side_boundary(const struct side *side, uint64_t position)
{
        if (side->ended)
                return UINT64_MAX;
        return side->extent.begin > position ? side->extent.begin : side->extent.end;
}

static bool holds_data(const struct bs_btrfs_extent *extent)
{
        return extent && extent->kind != BS_BTRFS_PREALLOC;
}

/* Whether two extents that hold data hold the same where both cover `position`. */
static bool is_same(const struct bs_btrfs_extent *old, const struct bs_btrfs_extent *present,
                    uint64_t position)
{
        if (old->kind != present->kind || old->compression != present->compression)
                return false;
        if (old->kind == BS_BTRFS_INLINE)
                return old->data && present->data && old->data_length == present->data_length &&
                       old->end == present->end && memcmp(old->data, present->data, old->data_length) == 0;
        return old->generation == present->generation && old->address == present->address &&
               old->disk_length == present->disk_length &&
               old->offset + (position - old->begin) == present->offset + (position - present->begin);
}

/* Whether the block at `edge`, if there is one, holds `position`. */
static bool is_within(const struct walk *walk, uint64_t edge, uint64_t position)
{
        return edge != NO_EDGE && position >= edge && position - edge < walk->block;
}

static bool is_edge(const struct walk *walk, uint64_t position)
{
        return is_within(walk, walk->edges[0], position) || is_within(walk, walk->edges[1], position);
}

static int judge(struct walk *walk, uint64_t position, uint64_t end)
{
        const struct bs_btrfs_extent *old = side_at(&walk->old, position);
        const struct bs_btrfs_extent *present = side_at(&walk->present, position);
        struct bs_extents *to = NULL;

        if (!holds_data(present))
                to = holds_data(old) ? walk->holes : NULL;
        else if (!holds_data(old) || is_edge(walk, position) || !is_same(old, present, position))
                to = walk->changed;
        if (end > walk->size)
                end = walk->size;
        return to && position < end ? bs_extents_append(to, position, end - position) : 0;
}

static uint64_t next_boundary(const struct walk *walk, uint64_t position)
{
        uint64_t boundary = side_boundary(&walk->old, position);
        uint64_t other = side_boundary(&walk->present, position);

        if (other < boundary)
                boundary = other;
        for (size_t i = 0; i < 2; i++) {
                uint64_t edge = walk->edges[i];

                if (edge > position && edge < boundary)
                        boundary = edge;
                else if (is_within(walk, edge, position) && edge + walk->block < boundary)
                        boundary = edge + walk->block;
        }
        return boundary;
}

static uint64_t round_up(uint64_t size, uint32_t block)
{
        return (size + block - 1) / block * block;
}

/* Where the block begins in which a file ends; none when it ends with a block. */
static uint64_t last_block(uint64_t size, uint32_t block)
{
        return size % block ? size / block * block : NO_EDGE;
}

int bs_btrfs_compare_extents(const struct bs_btrfs_compare *compare, struct bs_extents *changed,
                             struct bs_extents *holes)
{
        uint32_t block = compare->block;
        bool resized = compare->size != compare->old_size;
        struct walk walk = {
                .old = {.source = &compare->old, .limit = round_up(compare->old_size, block)},
                .present = {.source = &compare->present, .limit = round_up(compare->size, block)},
                .edges = {resized ? last_block(compare->old_size, block) : NO_EDGE,
                          resized ? last_block(compare->size, block) : NO_EDGE},
                .size = compare->size,
                .block = block,
                .changed = changed,
                .holes = holes,
        };
        int result = 0;

        for (uint64_t position = 0; result == 0 && position < walk.present.limit;) {
                result = side_reach(&walk.old, position);
                if (result == 0)
                        result = side_reach(&walk.present, position);
                if (result < 0 || (walk.old.ended && walk.present.ended))
                        break;

                uint64_t end = next_boundary(&walk, position);

                result = judge(&walk, position, end);
                position = end;
        }
        if (result == 0)
                result = side_finish(&walk.old);
        return result == 0 ? side_finish(&walk.present) : result;
}
