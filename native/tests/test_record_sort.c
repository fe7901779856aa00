/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "record_sort.h"

enum { COUNT = 5000 };

struct record {
        uint64_t mark;
        uint64_t key;
};

static uint64_t next_random(uint64_t *state)
{
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        return *state ^ *state >> 29;
}

static int compare(const void *left, const void *right)
{
        const struct record *a = left, *b = right;

        return (a->key > b->key) - (a->key < b->key);
}

/* Sort `count` records, and compare with qsort(3); each mark, which tells the key, has to be there still. */
static void check_sorted(struct record *records, size_t count)
{
        static struct record expected[COUNT];
        uint64_t marks = 0;

        for (size_t i = 0; i < count; i++) {
                records[i].mark = records[i].key * 3;
                marks ^= (records[i].mark + 1) * 0x9e3779b97f4a7c15u;
        }
        memcpy(expected, records, count * sizeof(*records));
        qsort(expected, count, sizeof(*expected), compare);
        bs_sort_records(records, count, sizeof(*records), offsetof(struct record, key));
        for (size_t i = 0; i < count; i++) {
                CHECK(records[i].key == expected[i].key);
                CHECK(records[i].mark == records[i].key * 3);
                marks ^= (records[i].mark + 1) * 0x9e3779b97f4a7c15u;
        }
        CHECK(marks == 0);
}

static void test_any_keys(void)
{
        static const uint64_t masks[] = {UINT64_MAX, 0xff, 1, 0, 0xff00000000000000u, 0x8000000000000001u};
        static struct record records[COUNT];
        uint64_t state = 1;

        for (size_t mask = 0; mask < sizeof(masks) / sizeof(*masks); mask++)
                for (size_t count = 0; count <= COUNT; count += count < 40 ? 1 : 1240) {
                        for (size_t i = 0; i < count; i++)
                                records[i].key = next_random(&state) & masks[mask];
                        check_sorted(records, count);
                        /* In order now; and the other way round. */
                        check_sorted(records, count);
                        for (size_t i = 0; i < count; i++)
                                records[i].key = ~records[i].key;
                        check_sorted(records, count);
                }
}

/* Keys that differ in every bit, so that most parts wait at a time. */
static void test_powers_of_two(void)
{
        static struct record records[64 * 20];

        for (size_t i = 0; i < 64 * 20; i++)
                records[i].key = UINT64_C(1) << i % 64;
        check_sorted(records, 64 * 20);
        for (size_t i = 0; i < 64 * 20; i++)
                records[i].key = UINT64_MAX << i % 64;
        check_sorted(records, 64 * 20);
}

int main(void)
{
        test_any_keys();
        test_powers_of_two();
        return 0;
}
