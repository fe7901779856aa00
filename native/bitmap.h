/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bitmaps as byte strings: bit n is bit n % 8, counted from the least significant, of byte n / 8.
 * They need no alignment.
 */
#ifndef BLOCKSNAP_BITMAP_H
#define BLOCKSNAP_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of a bitmap of `bits` bits. */
static inline uint64_t bs_bitmap_bytes(uint64_t bits)
{
        return bits / 8 + (bits % 8 != 0);
}

static inline void bs_bitmap_set(uint8_t *bitmap, uint64_t bit)
{
        bitmap[bit / 8] |= (uint8_t)(1u << bit % 8);
}

/* Set a bit and return what it was. */
static inline bool bs_bitmap_test_and_set(uint8_t *bitmap, uint64_t bit)
{
        bool was = bitmap[bit / 8] >> bit % 8 & 1;

        bs_bitmap_set(bitmap, bit);
        return was;
}

/* Number of runs of set bits, which is the number of extents the bitmap makes. */
size_t bs_bitmap_runs(const uint8_t *bitmap, size_t bytes);

/*
 * Write the runs of set bits as packed extents of `unit` bytes a bit, the first of which stands for the unit
 * `first`; `out` has room for bs_bitmap_runs() of them. -EOVERFLOW, before anything is written, when the end
 * of the bitmap does not fit 64 bits in bytes.
 */
int bs_bitmap_extents(const uint8_t *bitmap, size_t bytes, uint64_t first, uint64_t unit, uint8_t *out);

/* out = a & ~b over `a_bytes` bytes; where b is shorter its bits count as 0. `out` may be `a`. */
void bs_bitmap_subtract(const uint8_t *a, size_t a_bytes, const uint8_t *b, size_t b_bytes, uint8_t *out);

/* Make `count` bits from `first` on equal `value`; they lie within the bitmap. */
void bs_bitmap_fill(uint8_t *bitmap, uint64_t first, uint64_t count, bool value);

/*
 * Make the bits of packed extents equal `value`: all bits that an extent touches, of `unit` bytes each.
 * Those at or beyond `bits` are left out. -EOVERFLOW when the end of an extent does not fit 64 bits.
 */
int bs_bitmap_apply(uint8_t *bitmap, uint64_t bits, uint64_t unit, const uint8_t *packed, size_t count,
                    bool value);

#endif
