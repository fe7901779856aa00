/* SPDX-License-Identifier: Apache-2.0 */
/* Which parts of a file hold data, by SEEK_DATA and SEEK_HOLE. */
#ifndef BLOCKSNAP_SEEK_H
#define BLOCKSNAP_SEEK_H

#include "error.h"
#include "extent.h"
#include "interrupt.h"

/*
 * Append to `out` the parts of [offset, offset + length) that hold data. Holes beyond the end of the file
 * hold none. A descriptor that cannot tell (a block device, some filesystems) counts as all data. Moves
 * the file position. -EOVERFLOW when the range does not fit an off_t.
 */
int bs_data_extents(int fd, uint64_t offset, uint64_t length, const struct bs_interrupt *interrupt,
                    struct bs_error *error, struct bs_extents *out);

/*
 * Find the first part of [offset, end) that holds data, in the same sense; when there is none it is empty and
 * at `end`. Otherwise it ends beyond `offset`, whatever the filesystem answers.
 */
int bs_next_data(int fd, uint64_t offset, uint64_t end, struct bs_error *error, struct bs_extent *out);

#endif
