/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which chunks of a thin device are mapped, and which of them since a given pool time.
 *
 * The device has to be one that nobody writes to: a snapshot. Its tree is then immutable on disk and may be
 * read while the pool is live. What cannot be read or does not make sense is an error, never a smaller
 * answer: the nodes are checked one by one, and the mappings found must be as many as the pool says.
 *
 * Memory is two bitmaps of one bit a chunk, one of a bit a metadata block, 4 MiB of buffer and 24 bytes
 * for each of at most about a million blocks yet to be read: some 60 MiB for 8 TiB at 64 KiB.
 */
#ifndef BLOCKSNAP_THIN_SCAN_H
#define BLOCKSNAP_THIN_SCAN_H

#include "thin_meta.h"

struct bs_thin_scan {
        uint64_t device_id;
        uint64_t held_root; /* of the metadata snapshot to read, or 0 for the live metadata */
        uint64_t since;     /* pool time from which on a mapping counts as changed; 0 for all */
        uint64_t nr_chunks; /* mappings at or beyond this chunk are read and ignored */
        uint8_t *mapped;    /* in: zeros, bs_bitmap_bytes(nr_chunks); out: the mapped chunks */
        uint8_t *changed;   /* the same for those mapped at or after `since`; NULL when not wanted */
};

struct bs_thin_scan_result {
        struct bs_thin_view view;
        uint64_t nodes;    /* metadata blocks of the device's tree */
        uint64_t mappings; /* in the whole tree */
};

/*
 * Walk the tree of one device. -EUCLEAN, -ERANGE, -ENOKEY, -EINTR and others as in error.h. -ERANGE is for a
 * `since` that is later than the pool's own time (it is another pool then, or an older state of it, and
 * the answer would miss changes), or a volume of more than 2^64 bytes.
 */
int bs_thin_scan(const struct bs_reader *reader, const struct bs_thin_scan *scan,
                 const struct bs_interrupt *interrupt, struct bs_error *error,
                 struct bs_thin_scan_result *out);

#endif
