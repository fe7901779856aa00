/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap.h"

#include "extent.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

/* 64 bits from byte `at`, which may be closer than 8 bytes to the end; bits beyond it are 0. */
static uint64_t word_at(const uint8_t *bitmap, size_t bytes, size_t at)
{
        uint64_t word = 0;
        size_t left = bytes - at;

        memcpy(&word, bitmap + at, left < sizeof(word) ? left : sizeof(word));
        return le64toh(word);
}

size_t bs_bitmap_runs(const uint8_t *bitmap, size_t bytes)
{
        size_t runs = 0;
        uint64_t before = 0;

        /* A run begins at every set bit whose predecessor is clear. */
        for (size_t at = 0; at < bytes; at += 8) {
                uint64_t word = word_at(bitmap, bytes, at);

                runs += (size_t)__builtin_popcountll(word & ~(word << 1 | before));
                before = word >> 63;
        }
        return runs;
}

/* First bit at or after `from` that equals `wanted`, or `bits` when there is none. */
static uint64_t next_bit(const uint8_t *bitmap, size_t bytes, uint64_t from, bool wanted)
{
        uint64_t bits = (uint64_t)bytes * 8;

        while (from < bits) {
                uint64_t word = word_at(bitmap, bytes, (size_t)(from / 64 * 8));

                word = (wanted ? word : ~word) & (UINT64_MAX << from % 64);
                if (word) {
                        uint64_t found = from / 64 * 64 + (unsigned)__builtin_ctzll(word);

                        return found < bits ? found : bits;
                }
                from = (from / 64 + 1) * 64;
        }
        return bits;
}

int bs_bitmap_extents(const uint8_t *bitmap, size_t bytes, uint64_t first, uint64_t unit, uint8_t *out)
{
        uint64_t bits;
        uint64_t last;
        uint64_t size;
        uint64_t begin;

        if (__builtin_mul_overflow(bytes, (uint64_t)8, &bits) || __builtin_add_overflow(first, bits, &last) ||
            __builtin_mul_overflow(last, unit, &size))
                return -EOVERFLOW;
        for (uint64_t end = 0; (begin = next_bit(bitmap, bytes, end, true)) < bits;) {
                end = next_bit(bitmap, bytes, begin, false);
                bs_extent_pack((first + begin) * unit, (end - begin) * unit, out);
                out += BS_PACKED_EXTENT_SIZE;
        }
        return 0;
}

void bs_bitmap_subtract(const uint8_t *a, size_t a_bytes, const uint8_t *b, size_t b_bytes, uint8_t *out)
{
        size_t both = a_bytes < b_bytes ? a_bytes : b_bytes;

        for (size_t i = 0; i < both; i++)
                out[i] = (uint8_t)(a[i] & ~b[i]);
        if (a_bytes > both)
                memmove(out + both, a + both, a_bytes - both);
}

void bs_bitmap_fill(uint8_t *bitmap, uint64_t first, uint64_t count, bool value)
{
        uint64_t end = first + count;

        while (first < end) {
                if (first % 8 == 0 && end - first >= 8) {
                        size_t bytes = (size_t)((end - first) / 8);

                        memset(bitmap + first / 8, value ? 0xff : 0, bytes);
                        first += (uint64_t)bytes * 8;
                        continue;
                }

                uint8_t bit = (uint8_t)(1u << first % 8);

                bitmap[first / 8] = (uint8_t)(value ? bitmap[first / 8] | bit : bitmap[first / 8] & ~bit);
                first++;
        }
}

int bs_bitmap_apply(uint8_t *bitmap, uint64_t bits, uint64_t unit, const uint8_t *packed, size_t count,
                    bool value)
{
        for (size_t i = 0; i < count; i++, packed += BS_PACKED_EXTENT_SIZE) {
                uint64_t pair[2];
                uint64_t end;

                memcpy(pair, packed, sizeof(pair));

                uint64_t offset = le64toh(pair[0]);

                if (__builtin_add_overflow(offset, le64toh(pair[1]), &end))
                        return -EOVERFLOW;

                uint64_t first = offset / unit;
                uint64_t last = end / unit + (end % unit != 0);

                if (last > bits)
                        last = bits;
                if (first < last && end > offset)
                        bs_bitmap_fill(bitmap, first, last - first, value);
        }
        return 0;
}
