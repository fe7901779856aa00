/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What differs between two files or devices, told by reading them: for what tracks no changes, and to prove
 * what does.
 *
 * Holes are not read (SEEK_DATA): where neither side has data nothing is read, where one has, it is compared
 * with zeros. What lies beyond the end of the first reads as zeros, what lies beyond the end of the second is
 * not looked at: so the answer is what has to be written over the first, cut or filled up to the size of the
 * second.
 */
#ifndef BLOCKSNAP_COMPARE_H
#define BLOCKSNAP_COMPARE_H

#include "error.h"
#include "extent.h"
#include "interrupt.h"

#include <stdbool.h>

struct bs_compare {
        int base_fd;
        int later_fd;
        uint64_t block_size; /* a multiple of BS_IO_ALIGNMENT, at most BS_COMPARE_MAX_BLOCK */
};

enum { BS_COMPARE_MAX_BLOCK = 64 << 20 };

struct bs_compare_result {
        struct bs_extents changed; /* blocks, the last one cut at the size of the later file */
        uint64_t base_bytes;       /* read */
        uint64_t later_bytes;
        bool failed_in_base; /* which of the two the error is about */
};

void bs_compare_result_deinit(struct bs_compare_result *result);

/*
 * Compare two regular files or block devices, opened with O_DIRECT or without. A read that fails is -errno
 * with the call and, in `error->block`, the offset in bytes of the first 4096 that cannot be read; a file
 * that ends before the size it had is -ENODATA; a block size that will not do -ERANGE. Moves the file
 * positions, so the two must not share one. `out` has to be released whatever is returned.
 */
int bs_compare(const struct bs_compare *request, const struct bs_interrupt *interrupt, struct bs_error *error,
               struct bs_compare_result *out);

#endif
