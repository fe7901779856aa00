/* SPDX-License-Identifier: Apache-2.0 */
/* Reading from descriptors, and the small interface behind which a scan does not see one. */
#ifndef BLOCKSNAP_IO_H
#define BLOCKSNAP_IO_H

#include "error.h"

#include <stddef.h>
#include <stdint.h>

/* Memory, offset and length of an O_DIRECT read are multiples of the logical block size: 4096 at most. */
enum { BS_IO_ALIGNMENT = 4096 };

/* Read exactly `length` bytes at `offset`; -ENODATA when the file ends before. */
int bs_pread_all(int fd, void *buffer, size_t length, uint64_t offset);

/* Size in bytes of a block device or regular file; -ENOTBLK for anything else. `error` names the call. */
int bs_fd_size(int fd, struct bs_error *error, uint64_t *out);

/* What stands in the result of a read that is not over. */
enum {
        BS_READ_TO_BE_MADE = 1,
        BS_READ_STARTED = 2,
};

/* One read of several that are made together; `result` is 0 when the whole buffer was filled, or -errno. */
struct bs_read {
        uint64_t offset;
        void *buffer;
        size_t length;
        int result;
};

/*
 * Something that can be read at an offset: a descriptor, or memory in tests and fuzzers.
 * `read` fills the whole buffer or returns -errno; offset, length and buffer are aligned to
 * BS_IO_ALIGNMENT. `call` names what `read` does, for error messages.
 *
 * `start` and `finish` are NULL where nothing goes on in the background. `start` begins as many of the reads
 * as it can and marks them BS_READ_STARTED; `finish` waits for one of those, and leaves 0 or, when it has to
 * be made after all, BS_READ_TO_BE_MADE.
 */
struct bs_reader {
        int (*read)(void *context, uint64_t offset, void *buffer, size_t length);
        void (*start)(void *context, struct bs_read *reads, size_t count);
        void (*finish)(void *context, struct bs_read *read);
        void *context;
        const char *call;
        uint64_t size;
};

/*
 * Begin several reads, at the same time where that is possible. Each has to be finished, in any order, and
 * until then neither it nor its buffer may go away.
 */
void bs_read_start(const struct bs_reader *reader, struct bs_read *reads, size_t count);

/* Wait for one of them and set its result. */
void bs_read_finish(const struct bs_reader *reader, struct bs_read *read);

/* Begin several reads, wait for all, and set the result of each. */
void bs_read_many(const struct bs_reader *reader, struct bs_read *reads, size_t count);

/* A reader of the descriptor `*fd`, which stays the caller's and has to outlive the reader. */
int bs_fd_reader_init(int *fd, struct bs_error *error, struct bs_reader *out);

#endif
