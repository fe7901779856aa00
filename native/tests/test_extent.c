/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "extent.h"

static void test_append_merges_neighbours(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents list = {.count = 0};

        CHECK_EQUAL(bs_extents_append(&list, 0, 10), 0);
        CHECK_EQUAL(bs_extents_append(&list, 10, 5), 0);
        CHECK_EQUAL(bs_extents_append(&list, 15, 0), 0);
        CHECK_EQUAL(bs_extents_append(&list, 16, 1), 0);
        CHECK_EQUAL(list.count, 2);
        CHECK_EQUAL(list.items[0].offset, 0);
        CHECK_EQUAL(list.items[0].length, 15);
        CHECK_EQUAL(list.items[1].offset, 16);
        CHECK_EQUAL(list.items[1].length, 1);
}

static void test_append_refuses(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents list = {.count = 0};

        CHECK_EQUAL(bs_extents_append(&list, 100, 10), 0);
        CHECK_EQUAL(bs_extents_append(&list, 109, 1), -EINVAL);
        CHECK_EQUAL(bs_extents_append(&list, 0, 1), -EINVAL);
        CHECK_EQUAL(bs_extents_append(&list, UINT64_MAX, 1), -EOVERFLOW);
        CHECK_EQUAL(bs_extents_append(&list, UINT64_MAX - 1, 1), 0);
        CHECK_EQUAL(list.count, 2);
}

static int fill(struct bs_extents *list)
{
        int result = 0;

        bs_extents_deinit(list);
        for (uint64_t i = 0; i < 1000 && result == 0; i++)
                result = bs_extents_append(list, i * 4, 2);
        return result;
}

static void test_growth_survives_failing_allocations(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents list = {.count = 0};

        CHECK_ALLOCATIONS(fill(&list));
        CHECK_EQUAL(list.count, 1000);
        CHECK_EQUAL(list.items[999].offset, 999 * 4);
}

static void test_pack_is_little_endian(void)
{
        static const uint8_t expected[2 * BS_PACKED_EXTENT_SIZE] = {
                8, 7, 6, 5, 4, 3, 2, 1,    1, 0, 0, 0, 0, 0, 0, 0,
                0, 0, 0, 0, 0, 0, 0, 0x10, 0, 2, 0, 0, 0, 0, 0, 0,
        };
        _cleanup_(bs_extents_deinit) struct bs_extents list = {.count = 0};
        uint8_t packed[sizeof(expected)];

        CHECK_EQUAL(bs_extents_append(&list, 0x0102030405060708, 1), 0);
        CHECK_EQUAL(bs_extents_append(&list, 0x1000000000000000, 512), 0);
        bs_extents_pack(&list, packed);
        CHECK(memcmp(packed, expected, sizeof(expected)) == 0);
}

int main(void)
{
        test_append_merges_neighbours();
        test_append_refuses();
        test_growth_survives_failing_allocations();
        test_pack_is_little_endian();
        return 0;
}
