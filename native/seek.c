/* SPDX-License-Identifier: Apache-2.0 */
#include "seek.h"

#include <stdbool.h>
#include <unistd.h>

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

int bs_data_extents(int fd, uint64_t offset, uint64_t length, const struct bs_interrupt *interrupt,
                    struct bs_error *error, struct bs_extents *out)
{
        uint64_t end;

        if (__builtin_add_overflow(offset, length, &end) || end > INT64_MAX)
                return bs_fail_call(error, "lseek", -EOVERFLOW);
        for (uint64_t position = offset; position < end;) {
                uint64_t data = end;
                uint64_t hole = end;
                int result = seek(fd, position, SEEK_DATA, end, &data);

                if (cannot_tell(result))
                        return bs_extents_append(out, position, end - position);
                if (result == 0)
                        result = seek(fd, data, SEEK_HOLE, end, &hole);
                if (result < 0)
                        return bs_fail_call(error, "lseek", result);
                /* A hole punched between the two calls makes an empty extent: look again from there. */
                result = bs_extents_append(out, data, hole - data);
                if (result == 0)
                        result = bs_interrupted(interrupt);
                if (result < 0)
                        return result;
                position = hole;
        }
        return 0;
}
