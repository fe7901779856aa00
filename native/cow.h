/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The exception store of a classic LVM snapshot: which chunks of the origin were written since.
 *
 * dm-snapshot copies a chunk of the origin to the -cow device before it is written for the first time, and
 * appends an entry (chunk of the origin, chunk of the store) to a list on that device. The write to the
 * origin waits until the entry is on the medium. So whatever was written before a scan began is in the list
 * it finds, with the snapshot active and the origin in use. The layout is that of the kernel's
 * dm-snap-persistent.c: chunk 0 is the header, and the list comes in areas of one chunk, `per_area` entries
 * each, every one followed by the chunks that its entries are for:
 *
 *     header | area 0 | per_area chunks | area 1 | per_area chunks | ...
 *
 * The list ends at the first entry of zeros. An area is followed by another only when it is full, and what
 * the device held before is still behind the last one: the kernel clears an area right before it writes the
 * last entry of the one in front. Therefore an area is read when the one in front of it has been seen full,
 * not earlier; only areas that the caller knows to be full are read together.
 *
 * The entries found are kept as a list of numbers, sorted in the end, and not as a bitmap: that is 8 bytes a
 * changed chunk whatever the size of the volume, whose bitmap would have 256 MiB for 8 TiB at 4 KiB and touch
 * a page of it for each chunk that changed far from others.
 *
 * A store that is being merged into its origin loses entries from the end. Nothing on the device tells that:
 * it is for the caller to ask device-mapper, before and after.
 */
#ifndef BLOCKSNAP_COW_H
#define BLOCKSNAP_COW_H

#include "error.h"
#include "interrupt.h"
#include "io.h"

#include <stddef.h>
#include <stdint.h>

enum {
        BS_COW_ENTRY_SIZE = 16,
        /* LVM makes no others; the kernel would take smaller ones and larger ones. */
        BS_COW_MIN_CHUNK_SIZE = 4096,
        BS_COW_MAX_CHUNK_SIZE = 512 << 10,
        BS_COW_ATTEMPTS = 32, /* for a store in use */
};

struct bs_cow_scan {
        /* Bytes of the snapshot, which is what the origin had when it was made; 0 when not known. */
        uint64_t origin_size;
        /* So many areas are known to be full. */
        uint64_t settled_areas;
        /*
         * How often, a millisecond apart, an area is read whose entries have a gap. One larger than a sector
         * can be caught in mid-write, which is over in the time of one write; 0 is as good as 1.
         */
        unsigned attempts;
};

/* What a store says. */
struct bs_cow_result {
        uint64_t chunk_size;
        uint64_t origin_size;
        uint64_t *chunks; /* of the origin that changed, in ascending order, each once */
        size_t count;
        size_t capacity;
        uint64_t areas; /* up to and with the one in which the list ends */
        /* Chunks of the store below the next free one, as the kernel's own status counts them. */
        uint64_t allocated;
};

void bs_cow_result_deinit(struct bs_cow_result *result);

/*
 * Read the list. `out` is to be released with bs_cow_result_deinit() also after an error. -EUCLEAN, with the
 * chunk of the store and a reason of its own for each case, when the list cannot be trusted: the device was
 * never initialised, is no exception store, was invalidated by the kernel, has an unknown version or chunk
 * size, ends before the list does; when an entry points outside the store, into its metadata or outside the
 * origin, is there twice or behind the end of the list, or a settled area is not full. -ERANGE for an origin
 * of more than 2^63 bytes; otherwise as in error.h.
 */
int bs_cow_scan(const struct bs_reader *reader, const struct bs_cow_scan *scan,
                const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_cow_result *out);

/* Number of extents that the changed chunks make. */
size_t bs_cow_extent_count(const struct bs_cow_result *result);

/* Write them packed, clipped to the origin if its size is known; `out` has room for all of them. */
void bs_cow_extents_pack(const struct bs_cow_result *result, uint8_t *out);

#endif
