/* SPDX-License-Identifier: Apache-2.0 */
/* A growable list of extents: sorted, disjoint, neighbours merged, in bytes. */
#ifndef BLOCKSNAP_EXTENT_H
#define BLOCKSNAP_EXTENT_H

#include <stddef.h>
#include <stdint.h>

/* The half-open byte range [offset, offset + length). */
struct bs_extent {
        uint64_t offset;
        uint64_t length;
};

struct bs_extents {
        struct bs_extent *items;
        size_t count;
        size_t capacity;
};

/* Bytes of one extent as it leaves the core: two little-endian u64, offset and length. */
enum { BS_PACKED_EXTENT_SIZE = 16 };

void bs_extents_init(struct bs_extents *list);
void bs_extents_deinit(struct bs_extents *list);

/*
 * Append a range, merged with the last one when they touch. An empty range is ignored. Ranges come in
 * ascending order: one that begins before the end of the last is -EINVAL, one whose end does not fit
 * 64 bits -EOVERFLOW.
 */
int bs_extents_append(struct bs_extents *list, uint64_t offset, uint64_t length);

/* Write one extent in its packed form. */
void bs_extent_pack(uint64_t offset, uint64_t length, uint8_t out[BS_PACKED_EXTENT_SIZE]);

/* Write all extents; `out` has room for `list->count` of them. */
void bs_extents_pack(const struct bs_extents *list, uint8_t *out);

#endif
