/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_state.h"

enum {
        KIND_BITS = 2,
        KIND_MASK = (1 << KIND_BITS) - 1,
        COMPRESSION_MAX = 7, /* three more bits of the first byte of an extent */
        LONGEST_NAME = 255,
};

void bs_btrfs_state_begin(struct bs_bytes *bytes, uint32_t block, struct bs_btrfs_state_place *out)
{
        *out = (struct bs_btrfs_state_place){.block = block};
        bs_bytes_add_number(bytes, BS_BTRFS_STATE_EXTENTS, 1);
        bs_bytes_add_number(bytes, (unsigned)__builtin_ctz(block), 1);
}

void bs_btrfs_state_add(struct bs_bytes *bytes, struct bs_btrfs_state_place *place,
                        const struct bs_btrfs_extent *extent)
{
        uint32_t block = place->block;

        bs_bytes_add_number(bytes, (unsigned)extent->kind | (unsigned)extent->compression << KIND_BITS, 1);
        bs_bytes_add_varint(bytes, (extent->begin - place->end) / block);
        bs_bytes_add_varint(bytes, (extent->end - extent->begin) / block);
        place->end = extent->end;
        if (extent->kind != BS_BTRFS_REGULAR)
                return;
        bs_bytes_add_difference(bytes, extent->generation, place->generation);
        bs_bytes_add_difference(bytes, extent->address / block, place->address);
        bs_bytes_add_varint(bytes, extent->disk_length / block);
        bs_bytes_add_varint(bytes, extent->offset / block);
        place->generation = extent->generation;
        place->address = (extent->address + extent->disk_length) / block;
}

bool bs_btrfs_state_open(struct bs_span *span, uint32_t block, struct bs_btrfs_state_place *out)
{
        const uint8_t *head = bs_span_take(span, 2);

        *out = (struct bs_btrfs_state_place){.block = block};
        return head && head[0] == BS_BTRFS_STATE_EXTENTS && head[1] < 32 && block == 1U << head[1];
}

/* A count of blocks, in bytes. */
static bool take_blocks(struct bs_span *span, uint32_t block, uint64_t *out)
{
        return bs_span_take_varint(span, out) && !__builtin_mul_overflow(*out, block, out);
}

static bool take_numbers(struct bs_span *span, struct bs_btrfs_state_place *place,
                         struct bs_btrfs_extent *out)
{
        uint64_t end;

        if (!bs_span_take_difference(span, place->generation, &out->generation) ||
            !bs_span_take_difference(span, place->address, &out->address) ||
            !take_blocks(span, place->block, &out->disk_length) ||
            !take_blocks(span, place->block, &out->offset))
                return false;
        if (__builtin_mul_overflow(out->address, place->block, &out->address) ||
            __builtin_add_overflow(out->address, out->disk_length, &end) ||
            __builtin_add_overflow(out->offset, out->end - out->begin, &(uint64_t){0}))
                return false;
        place->generation = out->generation;
        place->address = end / place->block;
        return true;
}

bool bs_btrfs_state_take(struct bs_span *span, struct bs_btrfs_state_place *place,
                         struct bs_btrfs_extent *out)
{
        const uint8_t *head = bs_span_take(span, 1);
        uint64_t length;

        *out = (struct bs_btrfs_extent){.kind = BS_BTRFS_HOLE};
        if (!head)
                return true;
        out->kind = (enum bs_btrfs_extent_kind)(*head & KIND_MASK);
        out->compression = *head >> KIND_BITS;
        if (out->kind == BS_BTRFS_HOLE || out->compression > COMPRESSION_MAX ||
            !take_blocks(span, place->block, &out->begin) || !take_blocks(span, place->block, &length) ||
            __builtin_add_overflow(place->end, out->begin, &out->begin) ||
            __builtin_add_overflow(out->begin, length, &out->end) || out->end > INT64_MAX)
                return false;
        place->end = out->end;
        return out->kind != BS_BTRFS_REGULAR || take_numbers(span, place, out);
}

bool bs_btrfs_state_is_valid(const struct bs_span *span, uint32_t block)
{
        struct bs_btrfs_extent extent;
        struct bs_btrfs_state_place place;
        struct bs_span rest = *span;

        if (!bs_btrfs_state_open(&rest, block, &place))
                return false;
        do {
                if (!bs_btrfs_state_take(&rest, &place, &extent))
                        return false;
        } while (extent.kind != BS_BTRFS_HOLE);
        return true;
}

void bs_btrfs_listing_begin(struct bs_bytes *bytes)
{
        bs_bytes_add_number(bytes, BS_BTRFS_STATE_LISTING, 1);
}

void bs_btrfs_listing_add(struct bs_bytes *bytes, const struct bs_btrfs_name *previous,
                          const struct bs_btrfs_name *name)
{
        bs_bytes_add_varint(bytes, name->index - previous->index);
        bs_bytes_add_difference(bytes, name->inode, previous->inode);
        bs_bytes_add_number(bytes, name->kind, 1);
        bs_bytes_add_number(bytes, name->length, 1);
        bs_bytes_add(bytes, name->name, name->length);
}

bool bs_btrfs_listing_open(struct bs_span *span)
{
        const uint8_t *head = bs_span_take(span, 1);

        return head && *head == BS_BTRFS_STATE_LISTING;
}

bool bs_btrfs_listing_take(struct bs_span *span, struct bs_btrfs_name *name)
{
        uint64_t step;
        const uint8_t *head;

        name->length = 0;
        if (span->left == 0)
                return true;
        if (!bs_span_take_varint(span, &step) || step == 0 ||
            __builtin_add_overflow(name->index, step, &name->index) ||
            !bs_span_take_difference(span, name->inode, &name->inode))
                return false;
        head = bs_span_take(span, 2);
        if (!head || head[0] > BS_BTRFS_SUBVOLUME || head[1] == 0)
                return false;
        name->kind = head[0];
        name->length = head[1];
        name->name = bs_span_take(span, name->length);
        return name->name != NULL;
}
