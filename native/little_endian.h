/* SPDX-License-Identifier: Apache-2.0 */
/* Little-endian numbers in bytes of any alignment. */
#ifndef BLOCKSNAP_LITTLE_ENDIAN_H
#define BLOCKSNAP_LITTLE_ENDIAN_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t bs_le16(const uint8_t *from)
{
        uint16_t value;

        memcpy(&value, from, sizeof(value));
        return le16toh(value);
}

static inline uint32_t bs_le32(const uint8_t *from)
{
        uint32_t value;

        memcpy(&value, from, sizeof(value));
        return le32toh(value);
}

static inline uint64_t bs_le64(const uint8_t *from)
{
        uint64_t value;

        memcpy(&value, from, sizeof(value));
        return le64toh(value);
}

#endif
