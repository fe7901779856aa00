/* SPDX-License-Identifier: Apache-2.0 */
/* The mappings of a window of chunks, gathered leaf by leaf from two trees, and their comparison. */
#ifndef BLOCKSNAP_THIN_MERGE_H
#define BLOCKSNAP_THIN_MERGE_H

#include "extent.h"
#include "thin_meta.h"

/* Some of the mappings, ascending: those of one leaf. */
struct bs_thin_slice {
        uint64_t low; /* the first chunk */
        size_t first; /* in `words`: `count` chunks, then what each is mapped to, data block << 24 | time */
        size_t count;
};

struct bs_thin_mappings {
        uint64_t *words;
        size_t count;
        size_t capacity;
        struct bs_thin_slice *slices;
        size_t nr_slices;
        size_t slices_capacity;
};

void bs_thin_mappings_deinit(struct bs_thin_mappings *mappings);

/* Forget all of them, and keep the memory. */
void bs_thin_mappings_clear(struct bs_thin_mappings *mappings);

/* Add what a leaf maps in [first, last]. Leaves may come in any order; no two have the same chunk. */
int bs_thin_mappings_add(struct bs_thin_mappings *mappings, const struct bs_thin_node *leaf, uint64_t first,
                         uint64_t last);

struct bs_thin_merge {
        uint64_t chunk_size;
        uint64_t first_chunk; /* chunks outside [first_chunk, end_chunk) are counted and not reported */
        uint64_t end_chunk;   /* times chunk_size fits 64 bits */
        struct bs_extents *changed;
        struct bs_extents *discarded;
        uint64_t only[2]; /* out: mappings in the base alone, in the device alone */
};

/*
 * Append to the two lists what differs: a chunk that only the base maps is discarded, any other that is not
 * mapped to the same data block in both has changed. -ENOMEM.
 */
int bs_thin_merge(struct bs_thin_merge *merge, struct bs_thin_mappings *base,
                  struct bs_thin_mappings *device);

#endif
