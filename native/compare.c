/* SPDX-License-Identifier: Apache-2.0 */
#include "compare.h"

#include "cleanup.h"
#include "io.h"
#include "seek.h"

#include <fcntl.h>
#include <unistd.h>

enum {
        /* What is read of each side at once. Through the page cache, as much as stays in a core's own cache.
         */
        WINDOW = 256 << 10,
        DIRECT_WINDOW = 4 << 20,
        /* How far the kernel is told to read ahead, which it does for both sides at the same time. */
        READ_AHEAD = 4 << 20,
        /* Of what it is told at once, it may read no more than its own read-ahead, by default this. */
        READ_AHEAD_PIECE = 128 << 10,
};

struct side {
        int fd;
        bool direct;
        bool is_base;
        uint64_t size;
        uint64_t begin; /* of the next data that ends beyond the position; UINT64_MAX when there is no more */
        uint64_t end;
        uint64_t advised; /* the kernel was told that all before is wanted */
        uint64_t bytes;   /* read so far */
        uint8_t *buffer;
};

struct comparison {
        struct side base;
        struct side later;
        uint64_t block_size;
        uint64_t window; /* a multiple of the block size */
        struct bs_error *error;
        struct bs_extents *changed;
};

static int side_init(struct side *side, int fd, bool is_base, struct bs_error *error)
{
        *side = (struct side){.fd = fd, .is_base = is_base};

        int flags = fcntl(fd, F_GETFL);

        if (flags < 0)
                return bs_fail_call(error, "fcntl(F_GETFL)", -errno);
        side->direct = flags & O_DIRECT;
        return bs_fd_size(fd, error, &side->size);
}

/* Let `begin` and `end` be those of the first data that ends beyond `position`. */
static int find_data(struct side *side, uint64_t position, struct bs_error *error)
{
        struct bs_extent data = {.length = 0};

        if (side->begin == UINT64_MAX || side->end > position)
                return 0;
        if (position < side->size) {
                int result = bs_next_data(side->fd, position, side->size, error, &data);

                if (result < 0)
                        return result;
        }
        side->begin = data.length > 0 ? data.offset : UINT64_MAX;
        side->end = data.length > 0 ? data.offset + data.length : UINT64_MAX;
        return 0;
}

/* Keep READ_AHEAD bytes on their way. A wish, so nobody asks what became of it. */
static void read_ahead(struct side *side, uint64_t offset)
{
        uint64_t wanted = side->end - offset < READ_AHEAD ? side->end : offset + READ_AHEAD;

        if (side->direct)
                return;
        if (side->advised < offset)
                side->advised = offset;
        for (; side->advised < wanted; side->advised += READ_AHEAD_PIECE)
                posix_fadvise(side->fd, (off_t)side->advised, READ_AHEAD_PIECE, POSIX_FADV_WILLNEED);
}

/*
 * Read until at least `length` bytes are there. With O_DIRECT a read is of whole sectors, also where the file
 * ends within one; the buffer has room for that.
 */
static int read_range(int fd, uint8_t *buffer, uint64_t length, uint64_t offset)
{
        for (uint64_t done = 0; done < length;) {
                uint64_t wanted = (length - done + BS_IO_ALIGNMENT - 1) & ~(uint64_t)(BS_IO_ALIGNMENT - 1);
                ssize_t got = pread(fd, buffer + done, (size_t)wanted, (off_t)(offset + done));

                if (got < 0 && errno == EINTR)
                        continue;
                if (got < 0)
                        return -errno;
                if (got == 0)
                        return -ENODATA;
                done += (uint64_t)got;
        }
        return 0;
}

/* Read [offset, offset + length) of a side, with zeros beyond its end. */
static int read_side(struct side *side, uint64_t offset, uint64_t length, struct bs_error *error)
{
        uint64_t there = side->size - offset < length ? side->size - offset : length;

        read_ahead(side, offset);

        int result = read_range(side->fd, side->buffer, there, offset);

        if (result < 0) {
                /* Find out where exactly; what can be read piece by piece is good enough. */
                for (uint64_t at = 0; at < there; at += BS_IO_ALIGNMENT) {
                        uint64_t piece = there - at < BS_IO_ALIGNMENT ? there - at : BS_IO_ALIGNMENT;

                        result = read_range(side->fd, side->buffer + at, piece, offset + at);
                        if (result < 0) {
                                *error = (struct bs_error){.call = "pread", .block = offset + at};
                                return result;
                        }
                }
        }
        memset(side->buffer + there, 0, (size_t)(length - there));
        side->bytes += there;
        return 0;
}

static bool is_zero(const uint8_t *bytes, uint64_t length)
{
        /* All equal the one after them, and the first is zero. */
        return bytes[0] == 0 && memcmp(bytes, bytes + 1, (size_t)length - 1) == 0;
}

/* `right` NULL stands for zeros. */
static bool is_equal(const uint8_t *left, const uint8_t *right, uint64_t length)
{
        return right ? memcmp(left, right, (size_t)length) == 0 : is_zero(left, length);
}

static int compare_window(struct comparison *comparison, uint64_t offset, uint64_t length,
                          bool *failed_in_base)
{
        struct side *sides[] = {&comparison->base, &comparison->later};
        const uint8_t *bytes[2] = {NULL, NULL};

        for (size_t i = 0; i < 2; i++) {
                /* What has no data before the end of the window reads as zeros. */
                if (sides[i]->begin >= offset + length)
                        continue;
                *failed_in_base = sides[i]->is_base;

                int result = read_side(sides[i], offset, length, comparison->error);

                if (result < 0)
                        return result;
                bytes[i] = sides[i]->buffer;
        }

        const uint8_t *left = bytes[0] ? bytes[0] : bytes[1];
        const uint8_t *right = bytes[0] ? bytes[1] : NULL;

        if (is_equal(left, right, length))
                return 0;
        for (uint64_t at = 0; at < length; at += comparison->block_size) {
                uint64_t rest = length - at;
                uint64_t block = rest < comparison->block_size ? rest : comparison->block_size;

                if (is_equal(left + at, right ? right + at : NULL, block))
                        continue;

                int result = bs_extents_append(comparison->changed, offset + at, block);

                if (result < 0)
                        return result;
        }
        return 0;
}

/* Go from data to data of either side. */
static int walk(struct comparison *comparison, const struct bs_interrupt *interrupt, bool *failed_in_base)
{
        struct side *base = &comparison->base;
        struct side *later = &comparison->later;
        uint64_t unit = comparison->block_size;
        uint64_t size = later->size;

        for (uint64_t position = 0; position < size;) {
                int result = bs_interrupted(interrupt);

                *failed_in_base = true;
                if (result == 0)
                        result = find_data(base, position, comparison->error);
                if (result == 0) {
                        *failed_in_base = false;
                        result = find_data(later, position, comparison->error);
                }
                if (result < 0)
                        return result;

                const struct side *first = base->begin < later->begin ? base : later;

                if (first->begin >= size)
                        return 0;

                /* The window is as long as the data that begins it, in whole blocks. */
                uint64_t begin = first->begin / unit * unit;
                uint64_t end = (first->end + unit - 1) / unit * unit;

                if (begin < position)
                        begin = position;
                if (end > begin + comparison->window)
                        end = begin + comparison->window;
                if (end > size)
                        end = size;
                result = compare_window(comparison, begin, end - begin, failed_in_base);
                if (result < 0)
                        return result;
                position = end;
        }
        return 0;
}

static int check_request(const struct bs_compare *request, struct bs_error *error)
{
        if (request->block_size == 0 || request->block_size > BS_COMPARE_MAX_BLOCK ||
            request->block_size % BS_IO_ALIGNMENT)
                return bs_fail_range(error, "the block size has to be a multiple of 4096, at most 64 MiB");
        return 0;
}

int bs_compare(const struct bs_compare *request, const struct bs_interrupt *interrupt, struct bs_error *error,
               struct bs_compare_result *out)
{
        struct comparison comparison = {
                .block_size = request->block_size,
                .error = error,
                .changed = &out->changed,
        };
        _cleanup_free_ uint8_t *base_buffer = NULL;
        _cleanup_free_ uint8_t *later_buffer = NULL;

        *out = (struct bs_compare_result){.failed_in_base = false};

        int result = check_request(request, error);

        if (result < 0)
                return result;
        result = side_init(&comparison.base, request->base_fd, true, error);
        if (result < 0) {
                out->failed_in_base = true;
                return result;
        }
        result = side_init(&comparison.later, request->later_fd, false, error);
        if (result < 0)
                return result;

        uint64_t window = comparison.base.direct || comparison.later.direct ? DIRECT_WINDOW : WINDOW;

        comparison.window = (window + request->block_size - 1) / request->block_size * request->block_size;
        base_buffer = bs_alloc_aligned((size_t)comparison.window);
        later_buffer = bs_alloc_aligned((size_t)comparison.window);
        if (!base_buffer || !later_buffer)
                return -ENOMEM;
        comparison.base.buffer = base_buffer;
        comparison.later.buffer = later_buffer;
        result = walk(&comparison, interrupt, &out->failed_in_base);
        out->base_bytes = comparison.base.bytes;
        out->later_bytes = comparison.later.bytes;
        return result;
}

void bs_compare_result_deinit(struct bs_compare_result *result)
{
        bs_extents_deinit(&result->changed);
}
