/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of places where btree nodes are, and reading them in big sorted batches. */
#ifndef BLOCKSNAP_THIN_NODES_H
#define BLOCKSNAP_THIN_NODES_H

#include "thin_meta.h"

/* A growable list of places. */
struct bs_thin_places {
        struct bs_thin_place *items;
        size_t count;
        size_t capacity;
};

void bs_thin_places_deinit(struct bs_thin_places *places);

int bs_thin_places_add(struct bs_thin_places *places, const struct bs_thin_place *place);

/* Add all of another list. */
int bs_thin_places_extend(struct bs_thin_places *places, const struct bs_thin_places *more);

/* Sort by block number; lists that are in order already, as those of pools filled in order, cost one look. */
void bs_thin_places_sort_by_block(struct bs_thin_places *places);

/*
 * Sort by the lowest key. The children of one node are in that order, and those of several nodes are sorted
 * node by node, in linear time. -ENOMEM.
 */
int bs_thin_places_sort_by_key(struct bs_thin_places *places);

/* Called with each block that was read, and the place it was read for; 0 to go on, or -errno. */
typedef int (*bs_thin_visit_fn)(void *context, const uint8_t *block, const struct bs_thin_place *place);

/* What reading needs; `buffer` is BS_THIN_BATCH_BLOCKS blocks from bs_alloc_aligned(). */
struct bs_thin_batch {
        const struct bs_reader *reader;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        uint8_t *buffer;
};

enum {
#ifdef BS_TEST_BATCH_RUNS
        /* So small that its end is met. */
        BS_THIN_BATCH_BLOCKS = 96,
#else
        BS_THIN_BATCH_BLOCKS = 512,
#endif
};

/*
 * Read places, sorted by block number, many at a time, and visit them in that order. A request that fails
 * with EIO is made again block by block: the bad sector may be one that nobody asked for.
 */
int bs_thin_visit(const struct bs_thin_batch *batch, const struct bs_thin_place *places, size_t count,
                  bs_thin_visit_fn visit, void *context);

/* The same for a list, which is sorted first. */
int bs_thin_visit_all(const struct bs_thin_batch *batch, struct bs_thin_places *places,
                      bs_thin_visit_fn visit, void *context);

#endif
