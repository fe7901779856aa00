/* SPDX-License-Identifier: Apache-2.0 */
#include "seek.h"

#include <stdbool.h>
#include <unistd.h>

/* Counts as data where a hole begins no later than the data before it. */
enum { LEAST_DATA = 4096 };

/* lseek that answers `end` where there is nothing more to find. */
static int seek(int fd, uint64_t from, int whence, uint64_t end, uint64_t *out)
{
        off_t found = lseek(fd, (off_t)from, whence);

        if (found < 0 && errno != ENXIO)
                return -errno;
        *out = found < 0 || (uint64_t)found > end ? end : (uint64_t)found;
        return 0;
}

static bool cannot_tell(int result)
{
        return result == -EINVAL || result == -EOPNOTSUPP;
}

int bs_next_data(int fd, uint64_t offset, uint64_t end, struct bs_error *error, struct bs_extent *out)
{
        uint64_t data = end;
        uint64_t hole = end;

        if (end > INT64_MAX)
                return bs_fail_call(error, "lseek", -EOVERFLOW);

        int result = seek(fd, offset, SEEK_DATA, end, &data);

        if (cannot_tell(result)) {
                *out = (struct bs_extent){.offset = offset, .length = end - offset};
                return 0;
        }
        if (result == 0)
                result = seek(fd, data, SEEK_HOLE, end, &hole);
        if (result < 0)
                return bs_fail_call(error, "lseek", result);
        /* A hole punched between the two calls, or a filesystem of somebody's own: go on all the same. */
        if (data < offset)
                data = offset;
        if (hole <= data)
                hole = end - data < LEAST_DATA ? end : data + LEAST_DATA;
        *out = (struct bs_extent){.offset = data, .length = hole - data};
        return 0;
}

int bs_data_extents(int fd, uint64_t offset, uint64_t length, const struct bs_interrupt *interrupt,
                    struct bs_error *error, struct bs_extents *out)
{
        uint64_t end;

        if (__builtin_add_overflow(offset, length, &end))
                return bs_fail_call(error, "lseek", -EOVERFLOW);
        for (uint64_t position = offset; position < end;) {
                struct bs_extent data;
                int result = bs_next_data(fd, position, end, error, &data);

                if (result == 0)
                        result = bs_extents_append(out, data.offset, data.length);
                if (result == 0)
                        result = bs_interrupted(interrupt);
                if (result < 0)
                        return result;
                position = data.offset + data.length;
        }
        return 0;
}
