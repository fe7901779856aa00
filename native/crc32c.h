/* SPDX-License-Identifier: Apache-2.0 */
/* CRC-32C (Castagnoli), as device-mapper metadata uses it. */
#ifndef BLOCKSNAP_CRC32C_H
#define BLOCKSNAP_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/*
 * Continue `crc` over `length` bytes, without inverting before or after: dm starts with all ones and
 * does not invert at the end. Uses the processor's instruction where there is one.
 */
uint32_t bs_crc32c(uint32_t crc, const void *data, size_t length);

/* The same by table, for processors without the instruction and for the test that compares the two. */
uint32_t bs_crc32c_table(uint32_t crc, const void *data, size_t length);

#endif
