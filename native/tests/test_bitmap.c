/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap.h"
#include "check.h"
#include "cleanup.h"
#include "extent.h"

/* The runs of set bits, found bit by bit. */
static void reference(const uint8_t *bitmap, size_t bytes, uint64_t unit, struct bs_extents *out)
{
        for (size_t bit = 0; bit < bytes * 8; bit++) {
                if (bitmap[bit / 8] >> bit % 8 & 1)
                        CHECK_EQUAL(bs_extents_append(out, bit * unit, unit), 0);
        }
}

static void check_extents(const uint8_t *bitmap, size_t bytes)
{
        _cleanup_(bs_extents_deinit) struct bs_extents expected = {.count = 0};
        size_t runs = bs_bitmap_runs(bitmap, bytes);

        reference(bitmap, bytes, 4096, &expected);
        CHECK_EQUAL(runs, expected.count);

        /* Exactly as much room as there are runs, so that the sanitizer sees one too many. */
        _cleanup_free_ uint8_t *packed = bs_alloc_zeroed(runs * BS_PACKED_EXTENT_SIZE);
        _cleanup_free_ uint8_t *wanted = bs_alloc_zeroed(runs * BS_PACKED_EXTENT_SIZE);

        CHECK(packed && wanted);
        CHECK_EQUAL(bs_bitmap_extents(bitmap, bytes, 0, 4096, packed), 0);
        bs_extents_pack(&expected, wanted);
        CHECK(memcmp(packed, wanted, runs * BS_PACKED_EXTENT_SIZE) == 0);
}

static void test_extents_of_random_bitmaps(void)
{
        unsigned seed = 1;

        for (int round = 0; round < 3000; round++) {
                size_t bytes = (size_t)(round % 40);
                _cleanup_free_ uint8_t *bitmap = bs_alloc_zeroed(bytes);

                CHECK(bitmap);
                for (size_t i = 0; i < bytes; i++) {
                        seed = seed * 1103515245u + 12345u;
                        /* Whole bytes of one kind as well, for runs over words. */
                        bitmap[i] =
                                seed & 0x10000 ? (uint8_t)(seed >> 24) : (uint8_t)(seed & 0x20000 ? 0xff : 0);
                }
                check_extents(bitmap, bytes);
        }
}

static void test_extents_of_uniform_bitmaps(void)
{
        uint8_t bitmap[25];

        for (size_t bytes = 0; bytes <= sizeof(bitmap); bytes++) {
                memset(bitmap, 0, sizeof(bitmap));
                check_extents(bitmap, bytes);
                memset(bitmap, 0xff, sizeof(bitmap));
                check_extents(bitmap, bytes);
                memset(bitmap, 0x55, sizeof(bitmap));
                check_extents(bitmap, bytes);
        }
}

static void test_extents_refuse_what_does_not_fit(void)
{
        uint8_t bitmap[2] = {0, 0x80};
        uint8_t packed[BS_PACKED_EXTENT_SIZE];

        CHECK_EQUAL(bs_bitmap_extents(bitmap, 2, 0, UINT64_MAX / 16, packed), 0);
        CHECK_EQUAL(bs_bitmap_extents(bitmap, 2, 0, UINT64_MAX / 16 + 1, packed), -EOVERFLOW);
        CHECK_EQUAL(bs_bitmap_extents(bitmap, 2, 16, UINT64_MAX / 16, packed), -EOVERFLOW);
        CHECK_EQUAL(bs_bitmap_extents(bitmap, 2, UINT64_MAX - 15, 1, packed), -EOVERFLOW);
        CHECK_EQUAL(bs_bitmap_extents(bitmap, 2, UINT64_MAX - 16, 1, packed), 0);
}

static void test_subtract(void)
{
        const uint8_t a[4] = {0xff, 0x0f, 0xaa, 0x01};
        const uint8_t b[5] = {0x0f, 0xff, 0x02, 0x00, 0xff};
        uint8_t out[4];

        bs_bitmap_subtract(a, 4, b, 5, out);
        CHECK(memcmp(out, (const uint8_t[]){0xf0, 0x00, 0xa8, 0x01}, 4) == 0);
        bs_bitmap_subtract(a, 4, b, 1, out);
        CHECK(memcmp(out, (const uint8_t[]){0xf0, 0x0f, 0xaa, 0x01}, 4) == 0);
        memcpy(out, a, sizeof(out));
        bs_bitmap_subtract(out, 4, b, 2, out);
        CHECK(memcmp(out, (const uint8_t[]){0xf0, 0x00, 0xaa, 0x01}, 4) == 0);
}

static void test_single_bits(void)
{
        uint8_t bitmap[2] = {0, 0};

        CHECK_EQUAL(bs_bitmap_bytes(0), 0);
        CHECK_EQUAL(bs_bitmap_bytes(8), 1);
        CHECK_EQUAL(bs_bitmap_bytes(9), 2);
        CHECK(bs_bitmap_bytes(UINT64_MAX) == UINT64_MAX / 8 + 1);
        CHECK(!bs_bitmap_test_and_set(bitmap, 9));
        CHECK(bs_bitmap_test_and_set(bitmap, 9));
        bs_bitmap_set(bitmap, 7);
        CHECK_EQUAL(bitmap[0], 0x80);
        CHECK_EQUAL(bitmap[1], 0x02);
}

static void test_fill(void)
{
        for (unsigned first = 0; first < 40; first++) {
                for (unsigned count = 0; first + count <= 40; count++) {
                        uint8_t set[5] = {0};
                        uint8_t clear[5] = {0xff, 0xff, 0xff, 0xff, 0xff};

                        bs_bitmap_fill(set, first, count, true);
                        bs_bitmap_fill(clear, first, count, false);
                        for (unsigned bit = 0; bit < 40; bit++) {
                                bool inside = bit >= first && bit < first + count;

                                CHECK_EQUAL(set[bit / 8] >> bit % 8 & 1, inside);
                                CHECK_EQUAL(clear[bit / 8] >> bit % 8 & 1, !inside);
                        }
                }
        }
}

static void test_apply(void)
{
        uint8_t bitmap[2] = {0, 0};
        uint8_t packed[3 * BS_PACKED_EXTENT_SIZE];

        bs_extent_pack(150, 100, packed);
        bs_extent_pack(1000, 0, packed + 16);
        bs_extent_pack(1100, 1000, packed + 32);
        CHECK_EQUAL(bs_bitmap_apply(bitmap, 13, 100, packed, 3, true), 0);
        CHECK_EQUAL(bitmap[0], 0x06);
        CHECK_EQUAL(bitmap[1], 0x18);
        CHECK_EQUAL(bs_bitmap_apply(bitmap, 13, 100, packed + 32, 1, false), 0);
        CHECK_EQUAL(bitmap[1], 0);
        bs_extent_pack(UINT64_MAX, 1, packed);
        CHECK_EQUAL(bs_bitmap_apply(bitmap, 13, 100, packed, 1, true), -EOVERFLOW);
}

int main(void)
{
        test_fill();
        test_apply();
        test_single_bits();
        test_extents_of_uniform_bitmaps();
        test_extents_of_random_bitmaps();
        test_extents_refuse_what_does_not_fit();
        test_subtract();
        return 0;
}
