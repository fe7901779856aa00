/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "crc32c.h"

/* The definition, bit by bit. */
static uint32_t reference(uint32_t crc, const uint8_t *data, size_t length)
{
        for (size_t i = 0; i < length; i++) {
                crc ^= data[i];
                for (int bit = 0; bit < 8; bit++)
                        crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        }
        return crc;
}

static void test_known_value(void)
{
        /* The check value of CRC-32C, which inverts at the end. */
        CHECK_EQUAL(bs_crc32c(UINT32_MAX, "123456789", 9) ^ UINT32_MAX, 0xe3069283u);
}

static void test_every_table_entry(void)
{
        for (unsigned i = 0; i < 256; i++) {
                uint8_t byte = (uint8_t)i;

                CHECK_EQUAL(bs_crc32c_table(0, &byte, 1), reference(0, &byte, 1));
        }
}

static void test_all_lengths_and_alignments(void)
{
        uint8_t data[128];

        for (unsigned i = 0; i < sizeof(data); i++)
                data[i] = (uint8_t)(i * 151 + 7);
        for (size_t from = 0; from < 9; from++) {
                for (size_t length = 0; length + from <= sizeof(data); length++) {
                        uint32_t expected = reference(12345, data + from, length);

                        CHECK_EQUAL(bs_crc32c(12345, data + from, length), expected);
                        CHECK_EQUAL(bs_crc32c_table(12345, data + from, length), expected);
                }
        }
}

int main(void)
{
        test_known_value();
        test_every_table_entry();
        test_all_lengths_and_alignments();
        return 0;
}
