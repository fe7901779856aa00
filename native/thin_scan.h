/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which chunks of a thin device are mapped, and which of them since a given pool time.
 *
 * The device has to be one that nobody writes to: a snapshot. Its tree is then immutable on disk and may be
 * read while the pool is live. What cannot be read or does not make sense is an error, never a smaller
 * answer: the nodes are checked one by one, and the mappings found must be as many as the pool says.
 *
 * A device is looked at in one go or window by window, so that memory depends on the caller's window and not
 * on the size of the volume: two bitmaps of one bit a chunk of the window, one of a bit a metadata block (512
 * KiB at most), 2 MiB of buffer and 24 bytes for each of at most about a million blocks yet to be read.
 */
#ifndef BLOCKSNAP_THIN_SCAN_H
#define BLOCKSNAP_THIN_SCAN_H

#include "thin_meta.h"

struct bs_thin_scan {
        uint64_t device_id;
        uint64_t held_root; /* of the metadata snapshot to read, or 0 for the live metadata */
        uint64_t since;     /* pool time from which on a mapping counts as changed; 0 for all */
        uint64_t first;     /* where the window begins: bit 0 of the bitmaps */
        uint64_t nr_chunks; /* of the window; mappings beyond it are ignored, but counted if it is the last */
        bool more;          /* there is a window after this one */
        uint8_t *mapped;    /* in: zeros, bs_bitmap_bytes(nr_chunks); out: the mapped chunks */
        uint8_t *changed;   /* the same for those mapped at or after `since`; NULL when not wanted */
};

struct bs_thin_scan_result {
        struct bs_thin_view view;
        uint64_t nodes;    /* metadata blocks looked at; those on the edge of two windows are in both */
        uint64_t mappings; /* found in the window; of all windows together as many as the device's details say
                            */
};

/*
 * Walk the tree of one device. -EUCLEAN, -ERANGE, -ENOKEY, -EINTR and others as in error.h. -ERANGE is for a
 * `since` that is later than the pool's own time (it is another pool then, or an older state of it, and
 * the answer would miss changes), or a volume of more than 2^64 bytes. Where one window is all, it is seen to
 * that it holds as many mappings as the device's details say; with several that is for the caller to do.
 */
int bs_thin_scan(const struct bs_reader *reader, const struct bs_thin_scan *scan,
                 const struct bs_interrupt *interrupt, struct bs_error *error,
                 struct bs_thin_scan_result *out);

#endif
