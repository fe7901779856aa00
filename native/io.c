/* SPDX-License-Identifier: Apache-2.0 */
#include "io.h"

#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

int bs_pread_all(int fd, void *buffer, size_t length, uint64_t offset)
{
        uint8_t *to = buffer;
        uint64_t end;

        if (__builtin_add_overflow(offset, length, &end) || end > INT64_MAX)
                return -EOVERFLOW;
        while (length > 0) {
                ssize_t got = pread(fd, to, length, (off_t)offset);

                if (got < 0 && errno == EINTR)
                        continue;
                if (got < 0)
                        return -errno;
                if (got == 0)
                        return -ENODATA;
                to += got;
                length -= (size_t)got;
                offset += (uint64_t)got;
        }
        return 0;
}

int bs_fd_size(int fd, struct bs_error *error, uint64_t *out)
{
        struct stat status;

        if (fstat(fd, &status) < 0)
                return bs_fail_call(error, "fstat", -errno);
        if (S_ISREG(status.st_mode)) {
                *out = (uint64_t)status.st_size;
                return 0;
        }
        /* A character device would take the ioctl for something of its own. */
        if (!S_ISBLK(status.st_mode))
                return bs_fail_call(error, "fstat", -ENOTBLK);
        if (ioctl(fd, BLKGETSIZE64, out) < 0)
                return bs_fail_call(error, "ioctl(BLKGETSIZE64)", -errno);
        return 0;
}

void bs_read_start(const struct bs_reader *reader, struct bs_read *reads, size_t count)
{
        for (size_t i = 0; i < count; i++)
                reads[i].result = BS_READ_TO_BE_MADE;
        if (reader->start)
                reader->start(reader->context, reads, count);
}

void bs_read_finish(const struct bs_reader *reader, struct bs_read *read)
{
        if (read->result == BS_READ_STARTED)
                reader->finish(reader->context, read);
        if (read->result == BS_READ_TO_BE_MADE)
                read->result = reader->read(reader->context, read->offset, read->buffer, read->length);
}

void bs_read_many(const struct bs_reader *reader, struct bs_read *reads, size_t count)
{
        bs_read_start(reader, reads, count);
        for (size_t i = 0; i < count; i++)
                bs_read_finish(reader, &reads[i]);
}

static int read_fd(void *context, uint64_t offset, void *buffer, size_t length)
{
        return bs_pread_all(*(int *)context, buffer, length, offset);
}

int bs_fd_reader_init(int *fd, struct bs_error *error, struct bs_reader *out)
{
        *out = (struct bs_reader){.read = read_fd, .context = fd, .call = "pread"};
        return bs_fd_size(*fd, error, &out->size);
}
