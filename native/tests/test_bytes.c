/* SPDX-License-Identifier: Apache-2.0 */
#include "bytes.h"
#include "check.h"

static void test_numbers_come_back(void)
{
        static const uint64_t values[] = {
                0, 1, 127, 128, 300, 16383, 16384, UINT32_MAX, 1ULL << 62, 1ULL << 63, UINT64_MAX,
        };
        struct bs_bytes bytes = {.data = NULL};
        uint64_t previous = 0;

        for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
                bs_bytes_add_varint(&bytes, values[i]);
                bs_bytes_add_difference(&bytes, values[i], previous);
                bs_bytes_add_difference(&bytes, previous, values[i]);
                previous = values[i];
        }
        CHECK_EQUAL(bs_bytes_status(&bytes), 0);

        struct bs_span span = {.data = bytes.data, .left = bytes.count};
        uint64_t value;

        previous = 0;
        for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
                CHECK(bs_span_take_varint(&span, &value) && value == values[i]);
                CHECK(bs_span_take_difference(&span, previous, &value) && value == values[i]);
                CHECK(bs_span_take_difference(&span, values[i], &value) && value == previous);
                previous = values[i];
        }
        CHECK_EQUAL(span.left, 0);
        CHECK(!bs_span_take_varint(&span, &value));
        bs_bytes_deinit(&bytes);
}

static void test_small_differences_are_short(void)
{
        struct bs_bytes bytes = {.data = NULL};

        bs_bytes_add_difference(&bytes, 1000, 1010);
        bs_bytes_add_difference(&bytes, 1000, 937);
        CHECK_EQUAL(bytes.count, 2);
        CHECK_EQUAL(bytes.data[0], 19);
        CHECK_EQUAL(bytes.data[1], 126);
        bs_bytes_deinit(&bytes);
}

static void check_no_number(const char *coded, size_t length)
{
        struct bs_span span = {.data = (const uint8_t *)coded, .left = length};
        uint64_t value;

        CHECK(!bs_span_take_varint(&span, &value));
}

static void test_what_is_no_number(void)
{
        check_no_number("", 0);
        check_no_number("\x80", 1);
        check_no_number("\x80\x80\x80", 3);
        /* 2^64, and more bytes than any number has. */
        check_no_number("\x80\x80\x80\x80\x80\x80\x80\x80\x80\x02", 10);
        check_no_number("\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 11);
}

static void test_taking_stops_at_the_end(void)
{
        struct bs_span span = {.data = (const uint8_t *)"abc", .left = 3};

        CHECK(!bs_span_take(&span, 4));
        CHECK(memcmp(bs_span_take(&span, 3), "abc", 3) == 0);
        CHECK(bs_span_take(&span, 0));
        CHECK(!bs_span_take(&span, 1));
}

static void test_a_failed_allocation_is_remembered(void)
{
        struct bs_bytes bytes = {.data = NULL};

        bs_test_allocations(1);
        bs_bytes_add_number(&bytes, 7, 8);
        CHECK_EQUAL(bs_bytes_status(&bytes), 0);
        while (bytes.count < bytes.capacity)
                bs_bytes_add_number(&bytes, 7, 1);
        CHECK_EQUAL(bs_bytes_status(&bytes), 0);
        bs_bytes_add_number(&bytes, 7, 1);
        bs_test_allocations(-1);
        CHECK_EQUAL(bs_bytes_status(&bytes), -ENOMEM);
        bs_bytes_add(&bytes, "more", 4);
        CHECK_EQUAL(bytes.count, bytes.capacity);
        bs_bytes_clear(&bytes);
        CHECK_EQUAL(bs_bytes_status(&bytes), 0);
        CHECK(!bs_bytes_extend(&bytes, SIZE_MAX));
        CHECK_EQUAL(bs_bytes_status(&bytes), -ENOMEM);
        bs_bytes_deinit(&bytes);
}

int main(void)
{
        test_numbers_come_back();
        test_small_differences_are_short();
        test_what_is_no_number();
        test_taking_stops_at_the_end();
        test_a_failed_allocation_is_remembered();
        return 0;
}
