/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many reads of one descriptor at the same time, by io_uring(7).
 *
 * A disk that answers one request after another gives a fraction of what it can. Where there is no io_uring
 * (before Linux 5.6, under some seccomp filters, switched off by sysctl) reads are made one by one.
 */
#ifndef BLOCKSNAP_RING_H
#define BLOCKSNAP_RING_H

#include "io.h"

#include <stdbool.h>

/* The rings shared with the kernel; the names are those of the manual. */
struct bs_ring {
        int file;      /* what is read */
        int ring;      /* the descriptor of the rings, -1 until they are needed */
        bool disabled; /* they could not be set up */
        size_t under_way;
        void *rings;
        size_t rings_size;
        void *entries;
        size_t entries_size;
        uint32_t *submission_tail;
        uint32_t *completion_head;
        uint32_t *completion_tail;
        void *completions;
        uint32_t submission_mask;
        uint32_t completion_mask;
};

/*
 * A reader of the descriptor `file`, which stays the caller's. `ring` has to outlive the reader, and to be
 * released by bs_ring_deinit() whatever is returned.
 */
int bs_ring_reader_init(struct bs_ring *ring, int file, struct bs_error *error, struct bs_reader *out);

void bs_ring_deinit(struct bs_ring *ring);

#endif
