/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Read a send stream that anybody may have written.
 *
 * The input is one byte of options and then the stream. Mutations of a command never keep its checksum, so
 * they can be mended first: then the checks behind them are reached. Cut into pieces or not, a stream is the
 * same.
 */
#include "btrfs_steps.h"
#include "cleanup.h"
#include "crc32c.h"
#include "little_endian.h"

#include <stdlib.h>

enum {
        MEND_CHECKSUMS = 1,
        MEND_LENGTHS = 2,
        PIECE_SHIFT = 2, /* the other six bits are the length of the pieces */

        HEADER_SIZE = 17,
        COMMAND_HEADER_SIZE = 10,
};

static void store32(uint8_t *to, uint32_t value)
{
        value = htole32(value);
        memcpy(to, &value, sizeof(value));
}

/* Let each command have the right checksum; and the last one the length that is left, if that is wanted. */
static void mend(uint8_t *stream, size_t size, unsigned options)
{
        for (size_t at = HEADER_SIZE; at + COMMAND_HEADER_SIZE <= size;) {
                uint8_t *command = stream + at;
                size_t room = size - at - COMMAND_HEADER_SIZE;

                if (bs_le32(command) > room) {
                        if (!(options & MEND_LENGTHS))
                                return;
                        store32(command, (uint32_t)room);
                }

                size_t whole = bs_le32(command) + COMMAND_HEADER_SIZE;

                store32(command + 6, 0);
                store32(command + 6, bs_crc32c(0, command, whole));
                at += whole;
        }
}

static int read_stream(const uint8_t *bytes, size_t size, size_t piece, struct bs_steps *steps,
                       struct bs_error *error)
{
        struct bs_stream stream;
        int result = bs_stream_init(&stream, bs_steps_take, steps, error);

        for (size_t at = 0; at < size && result == 0; at += piece)
                result = bs_stream_push(&stream, bytes + at, size - at < piece ? size - at : piece);
        if (result == 0)
                result = bs_stream_finish(&stream);
        bs_stream_deinit(&stream);
        return result;
}

static void require(int holds)
{
        if (!holds)
                abort();
}

static int same(const struct bs_steps *one, const struct bs_steps *other)
{
        if (one->count != other->count || one->range_count != other->range_count ||
            one->text_length != other->text_length)
                return 0;
        for (size_t i = 0; i < one->count; i++) {
                if (one->items[i].kind != other->items[i].kind ||
                    one->items[i].number != other->items[i].number)
                        return 0;
        }
        return one->text_length == 0 || memcmp(one->text, other->text, one->text_length) == 0;
}

static void check_steps(const struct bs_steps *steps)
{
        for (size_t i = 0; i < steps->count; i++) {
                const struct bs_step *step = &steps->items[i];

                require(step->kind < BS_STEP_KINDS);
                require(step->path.offset + step->path.length <= steps->text_length);
                require(step->other.offset + step->other.length <= steps->text_length);
                require(step->first_range + step->range_count <= steps->range_count);
                require((step->range_count > 0) ==
                        (step->kind == BS_STEP_DATA || step->kind == BS_STEP_HOLE));
        }
        for (size_t i = 0; i < steps->range_count; i++)
                require(steps->ranges[i].offset + steps->ranges[i].length <= INT64_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        _cleanup_(bs_steps_deinit) struct bs_steps whole;
        _cleanup_(bs_steps_deinit) struct bs_steps cut;
        struct bs_error error = {.reason = NULL};
        struct bs_error cut_error = {.reason = NULL};

        bs_steps_init(&whole);
        bs_steps_init(&cut);
        if (size < 1)
                return 0;

        unsigned options = data[0];
        _cleanup_free_ uint8_t *stream = bs_realloc(NULL, size, 1);

        require(stream != NULL);
        memcpy(stream, data + 1, size - 1);
        if (options & MEND_CHECKSUMS)
                mend(stream, size - 1, options);

        int result = read_stream(stream, size - 1, size, &whole, &error);

        check_steps(&whole);
        require(result == 0 || (result == -EUCLEAN && error.reason));
        require(read_stream(stream, size - 1, (options >> PIECE_SHIFT) + 1, &cut, &cut_error) == result);
        require(error.reason == cut_error.reason && error.block == cut_error.block);
        require(same(&whole, &cut));
        return 0;
}
