/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What differs between two thin devices of one pool that nobody writes to, or what one of them maps.
 *
 * Nodes are copied on write: the same block number in both trees means the same bytes, so the subtree
 * below is the same and is not looked at. The trees are walked side by side, level by level, dropping what
 * both have; only leaves that are in one tree alone are compared, mapping by mapping. A cancellation that is
 * missed, because two subtrees are of different depth, costs reads and never correctness.
 *
 * The walk goes through the volume in windows of keys, each small enough to be held in memory: some 20 MiB
 * at a depth of four, whatever the size of the trees, beside the answer of 16 bytes an extent.
 */
#ifndef BLOCKSNAP_THIN_DIFF_H
#define BLOCKSNAP_THIN_DIFF_H

#include "extent.h"
#include "thin_meta.h"

/* Device ids have 24 bits: this is none. */
#define BS_THIN_NO_DEVICE UINT64_MAX

struct bs_thin_diff {
        uint64_t base_id;     /* BS_THIN_NO_DEVICE: an empty one, so all that is mapped has changed */
        uint64_t device_id;   /* the later snapshot */
        uint64_t held_root;   /* of the metadata snapshot to read, or 0 for the live metadata */
        uint64_t first_chunk; /* the answer is about the chunks [first_chunk, end_chunk) */
        uint64_t end_chunk;
};

struct bs_thin_diff_result {
        struct bs_thin_view base; /* zeros without a base */
        struct bs_thin_view device;
        struct bs_extents changed;   /* mapped in the device, and in the base not or to another block */
        struct bs_extents discarded; /* mapped in the base alone */
        uint64_t nodes;              /* metadata blocks read, of both trees */
};

void bs_thin_diff_result_deinit(struct bs_thin_diff_result *result);

/*
 * Compare two devices. -EUCLEAN, -ERANGE, -ENOKEY, -EINTR and others as in error.h; the key that was not
 * found is `*missing`. The numbers of mappings that the pool keeps of both devices have to agree with the
 * answer. `out` has to be released whatever is returned.
 */
int bs_thin_diff(const struct bs_reader *reader, const struct bs_thin_diff *request,
                 const struct bs_interrupt *interrupt, struct bs_error *error, uint64_t *missing,
                 struct bs_thin_diff_result *out);

#endif
