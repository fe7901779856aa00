/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What differs between two clones (FICLONE) of one file on XFS, told by where their bytes lie: FS_IOC_FIEMAP.
 *
 * The rule. Let A and B be clones that both exist and that nobody writes to. A byte of B is what it was in A
 * if it lies at the same place of the device in both, or if neither has it. XFS overwrites in place only what
 * nobody else refers to: as long as A exists, whoever writes to a block that A shares gets a new one, and a
 * block of A is not given to anybody else. So the same place means the same bytes, whatever happened to the
 * file that both were cloned from.
 *
 * What the rule does not cover, and what is done about it:
 *
 * - A saved map of A, once A was removed, proves nothing: its blocks are the file's own again, are
 * overwritten in place, and the new clone has the same map with other bytes. Both files are asked here, one
 * after the other; no map is kept.
 * - A file that is written to: what is dirty in the page cache shows the old map. FIEMAP_FLAG_SYNC writes it
 * out first, but only immutable clones make the answer one of an instant. Callers compare size, mtime and
 * ctime of both before and after with what they remember.
 * - Other filesystems. On btrfs the map of a compressed extent leaves out where in it the bytes begin, so
 * that different bytes can have the same record; and a map of ext4 says nothing, for nothing is shared there.
 *   Only XFS is believed.
 * - XFS with a realtime device has two devices, whose places have the same numbers: files there are refused.
 * - An extent whose place is not known, not yet chosen, or not that of its bytes (DELALLOC, UNKNOWN, ENCODED,
 *   INLINE, NOT_ALIGNED, and any flag that is not known here) is refused. SHARED, MERGED and LAST are not
 *   looked at: LAST means the last one of the range that was asked for, so the end is where no more records
 *   come.
 * - An UNWRITTEN extent reads as zeros, like a hole, and counts as one.
 * - How neighbours are cut into records differs between clones, so bytes are compared and not records.
 *
 * Too wide an answer is possible: defragmentation moves a block, and so does rewriting it with what it held.
 */
#ifndef BLOCKSNAP_FIEMAP_H
#define BLOCKSNAP_FIEMAP_H

#include "error.h"
#include "extent.h"
#include "interrupt.h"

#include <linux/fiemap.h>
#include <stdbool.h>

/* Records that are asked for at once: 112 KiB a map. More does not make the kernel faster. */
enum { BS_FIEMAP_RECORDS = 2048 };

/*
 * Something that answers as the ioctl FS_IOC_FIEMAP does: `ask` fills in the records of `request`, which has
 * room for fm_extent_count, and fm_mapped_extents; it returns 0 or -errno. A descriptor, or memory in tests
 * and fuzzers.
 */
struct bs_fiemap_source {
        int (*ask)(void *context, struct fiemap *request);
        void *context;
};

/* The map of a file of `size` bytes; what lies beyond is not looked at. */
struct bs_fiemap {
        struct bs_fiemap_source source;
        uint64_t size;
};

struct bs_fiemap_diff {
        struct bs_extents changed;   /* data in the later file, and not the same in the base */
        struct bs_extents discarded; /* data in the base, and zeros without a place in the later file */
        uint64_t base_records;       /* how many the kernel gave */
        uint64_t records;
        bool failed_in_base; /* which of the two the error is about */
};

void bs_fiemap_diff_deinit(struct bs_fiemap_diff *diff);

/*
 * Compare two maps; all that is in `out` lies below the later file's size. Memory is bounded by the answer,
 * not by the maps. A map that contradicts itself, or that cannot be compared, is -EUCLEAN with the offset, in
 * bytes, in `error->block`. `out` has to be released whatever is returned.
 */
int bs_fiemap_diff(const struct bs_fiemap *base, const struct bs_fiemap *later,
                   const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_fiemap_diff *out);

/*
 * The maps of two descriptors, which stay the caller's and have to outlive the maps. -ERANGE with a reason
 * unless both are regular files of the same XFS and not on its realtime device.
 */
int bs_fiemap_of_files(int *base_fd, int *later_fd, struct bs_error *error, struct bs_fiemap *base,
                       struct bs_fiemap *later);

/*
 * A source that hands out records from memory as they come, without those beyond the range that is asked for:
 * right only when they are.
 */
struct bs_fiemap_replay {
        const uint8_t *records; /* struct fiemap_extent as the kernel lays it out, aligned or not */
        size_t count;
        uint64_t at_once; /* the most it gives in one answer */
};

struct bs_fiemap_source bs_fiemap_replay_source(struct bs_fiemap_replay *replay);

#endif
