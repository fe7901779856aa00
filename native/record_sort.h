/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sorting records by a u64 in them: in place, without a call for each comparison, allocating nothing
 * (qsort(3) does both), and in linear time whatever the input.
 */
#ifndef BLOCKSNAP_RECORD_SORT_H
#define BLOCKSNAP_RECORD_SORT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BS_SORT_MAX_SIZE = 32, BS_SORT_FEW = 16 };

static inline uint64_t bs_sort_key(const uint8_t *records, size_t index, size_t size, size_t key)
{
        uint64_t value;

        memcpy(&value, records + index * size + key, sizeof(value));
        return value;
}

static inline void bs_sort_swap(uint8_t *records, size_t a, size_t b, size_t size)
{
        uint8_t kept[BS_SORT_MAX_SIZE];

        memcpy(kept, records + a * size, size);
        memcpy(records + a * size, records + b * size, size);
        memcpy(records + b * size, kept, size);
}

static inline void bs_sort_few(uint8_t *records, size_t count, size_t size, size_t key)
{
        for (size_t i = 1; i < count; i++)
                for (size_t j = i;
                     j > 0 && bs_sort_key(records, j - 1, size, key) > bs_sort_key(records, j, size, key);
                     j--)
                        bs_sort_swap(records, j - 1, j, size);
}

/* Move the records whose key lacks `bit` before those that have it; return how many lack it. */
static inline size_t bs_sort_partition(uint8_t *records, size_t count, size_t size, size_t key, uint64_t bit)
{
        size_t low = 0;

        for (size_t high = count;;) {
                while (low < high && !(bs_sort_key(records, low, size, key) & bit))
                        low++;
                while (low < high && (bs_sort_key(records, high - 1, size, key) & bit))
                        high--;
                if (low == high)
                        return low;
                bs_sort_swap(records, low, high - 1, size);
        }
}

/*
 * Sort `count` records of `size` bytes by the u64, in the machine's byte order, at offset `key` of each.
 * Records that are in order already cost one look. Both sizes are constants where this is called, and
 * inlining makes the code for them: radix exchange, from the highest bit in which keys differ down.
 */
static inline __attribute__((always_inline)) void bs_sort_records(void *array, size_t count, size_t size,
                                                                  size_t key)
{
        /* A part that waits differs in a lower bit than the one that waits below it. */
        struct {
                uint8_t *records;
                size_t count;
                uint64_t bit;
        } waiting[65] = {{.records = array, .count = count}};
        uint64_t differ = 0;
        unsigned depth = 0;
        size_t in_order = 1;

        for (size_t i = 1; i < count; i++) {
                uint64_t one = bs_sort_key(array, i - 1, size, key);
                uint64_t next = bs_sort_key(array, i, size, key);

                differ |= one ^ next;
                in_order += one <= next;
        }
        if (count < 2 || in_order == count)
                return;
        waiting[depth++].bit = UINT64_C(1) << (63 - __builtin_clzll(differ));
        while (depth > 0) {
                uint8_t *records = waiting[--depth].records;
                size_t left = waiting[depth].count;
                uint64_t bit = waiting[depth].bit;

                for (; left > BS_SORT_FEW && bit; bit >>= 1) {
                        size_t low = bs_sort_partition(records, left, size, key, bit);

                        waiting[depth].records = records + low * size;
                        waiting[depth].count = left - low;
                        waiting[depth++].bit = bit >> 1;
                        left = low;
                }
                if (bit)
                        bs_sort_few(records, left, size, key);
        }
}

#endif
