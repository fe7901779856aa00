/* SPDX-License-Identifier: Apache-2.0 */
#include "bytes.h"

#include "memory.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

enum { SMALLEST = 256 };

void bs_bytes_deinit(struct bs_bytes *bytes)
{
        bs_free(bytes->data);
        *bytes = (struct bs_bytes){.data = NULL};
}

void bs_bytes_clear(struct bs_bytes *bytes)
{
        bytes->count = 0;
        bytes->failed = false;
}

int bs_bytes_status(const struct bs_bytes *bytes)
{
        return bytes->failed ? -ENOMEM : 0;
}

static bool grow(struct bs_bytes *bytes, size_t needed)
{
        size_t capacity = bytes->capacity ? bytes->capacity : SMALLEST;
        uint8_t *data;

        while (capacity < needed) {
                if (__builtin_mul_overflow(capacity, (size_t)2, &capacity))
                        return false;
        }
        data = bs_realloc(bytes->data, capacity, 1);
        if (!data)
                return false;
        bytes->data = data;
        bytes->capacity = capacity;
        return true;
}

uint8_t *bs_bytes_extend(struct bs_bytes *bytes, size_t length)
{
        size_t needed;

        if (bytes->failed)
                return NULL;
        if (__builtin_add_overflow(bytes->count, length, &needed) ||
            ((needed > bytes->capacity || !bytes->data) && !grow(bytes, needed))) {
                bytes->failed = true;
                return NULL;
        }

        uint8_t *room = bytes->data + bytes->count;

        bytes->count = needed;
        return room;
}

void bs_bytes_add(struct bs_bytes *bytes, const void *data, size_t length)
{
        uint8_t *room = bs_bytes_extend(bytes, length);

        if (room && length)
                memcpy(room, data, length);
}

void bs_bytes_add_number(struct bs_bytes *bytes, uint64_t value, size_t size)
{
        value = htole64(value);
        bs_bytes_add(bytes, &value, size);
}

void bs_bytes_add_varint(struct bs_bytes *bytes, uint64_t value)
{
        uint8_t coded[10];
        size_t length = 0;

        for (; value > 0x7f; value >>= 7)
                coded[length++] = (uint8_t)(value | 0x80);
        coded[length++] = (uint8_t)value;
        bs_bytes_add(bytes, coded, length);
}

void bs_bytes_add_difference(struct bs_bytes *bytes, uint64_t value, uint64_t previous)
{
        uint64_t difference = value - previous;

        bs_bytes_add_varint(bytes, difference << 1 ^ (difference >> 63 ? UINT64_MAX : 0));
}

const uint8_t *bs_span_take(struct bs_span *span, size_t length)
{
        const uint8_t *taken = span->data;

        if (length > span->left)
                return NULL;
        span->data += length;
        span->left -= length;
        return taken;
}

bool bs_span_take_varint(struct bs_span *span, uint64_t *out)
{
        uint64_t value = 0;

        for (unsigned shift = 0; shift < 64; shift += 7) {
                const uint8_t *byte = bs_span_take(span, 1);
                uint64_t bits;

                if (!byte)
                        return false;
                bits = *byte & 0x7f;
                if (bits << shift >> shift != bits)
                        return false;
                value |= bits << shift;
                if (!(*byte & 0x80)) {
                        *out = value;
                        return true;
                }
        }
        return false;
}

bool bs_span_take_difference(struct bs_span *span, uint64_t previous, uint64_t *out)
{
        uint64_t coded;

        if (!bs_span_take_varint(span, &coded))
                return false;
        *out = previous + (coded >> 1 ^ (coded & 1 ? UINT64_MAX : 0));
        return true;
}
