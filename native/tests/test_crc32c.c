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
        static uint8_t data[9000];

        for (unsigned i = 0; i < sizeof(data); i++)
                data[i] = (uint8_t)(i * 151 + 7);
        for (size_t from = 0; from < 9; from++) {
                for (size_t length = 0; length + from <= sizeof(data); length += length < 64 ? 1 : 211) {
                        uint32_t expected = reference(12345, data + from, length);

                        CHECK_EQUAL(bs_crc32c(12345, data + from, length), expected);
                        CHECK_EQUAL(bs_crc32c_table(12345, data + from, length), expected);
                }
        }
}

/* Of a metadata block, which is what the three streams are made for, every bit counts. */
static void test_every_bit_of_a_block(void)
{
        static uint8_t data[4092];
        uint32_t nothing = bs_crc32c(0, data, sizeof(data));

        CHECK_EQUAL(nothing, 0);
        for (size_t bit = 0; bit < sizeof(data) * 8; bit += bit % 8 == 0 ? 7 : 1) {
                data[bit / 8] = (uint8_t)(1u << bit % 8);
                CHECK_EQUAL(bs_crc32c(0, data, sizeof(data)), bs_crc32c_table(0, data, sizeof(data)));
                data[bit / 8] = 0;
        }
}

/* x^n mod P: what multiplies by x is a shift. */
static uint32_t power_of_x(unsigned n)
{
        uint32_t power = 0x80000000u;

        for (; n > 0; n--)
                power = power >> 1 ^ (power & 1 ? 0x82f63b78u : 0);
        return power;
}

static void test_constants_of_the_streams(void)
{
        CHECK_EQUAL(power_of_x(8 * (8 * 170 + 8) - 33), 0x79113270u);
        CHECK_EQUAL(power_of_x(8 * (2 * 8 * 170 + 8) - 33), 0x7b454cb3u);
}

int main(void)
{
        test_known_value();
        test_every_table_entry();
        test_all_lengths_and_alignments();
        test_every_bit_of_a_block();
        test_constants_of_the_streams();
        return 0;
}
