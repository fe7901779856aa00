/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A growable byte string. A failed allocation is remembered, and later additions do nothing, so that
 * a record can be written field by field and asked once whether all of it is there.
 */
#ifndef BLOCKSNAP_BYTES_H
#define BLOCKSNAP_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bs_bytes {
        uint8_t *data;
        size_t count;
        size_t capacity;
        bool failed;
};

void bs_bytes_deinit(struct bs_bytes *bytes);

/* Make it empty, and keep the memory. */
void bs_bytes_clear(struct bs_bytes *bytes);

/* 0, or -ENOMEM when an addition since the last clearing failed. */
int bs_bytes_status(const struct bs_bytes *bytes);

/* Room for `length` more bytes, which count from now on; NULL when there is none. */
uint8_t *bs_bytes_extend(struct bs_bytes *bytes, size_t length);

void bs_bytes_add(struct bs_bytes *bytes, const void *data, size_t length);

/* The lowest `size` bytes of a number, little endian; at most 8. */
void bs_bytes_add_number(struct bs_bytes *bytes, uint64_t value, size_t size);

/* A number as LEB128: seven bits a byte, lowest first, the top bit set on all but the last. */
void bs_bytes_add_varint(struct bs_bytes *bytes, uint64_t value);

/* A difference, which may be negative, as a varint: 0, -1, 1, -2, ... are 0, 1, 2, 3, ... */
void bs_bytes_add_difference(struct bs_bytes *bytes, uint64_t value, uint64_t previous);

/* Bytes that are read from the front. */
struct bs_span {
        const uint8_t *data;
        size_t left;
};

/* Take `length` bytes; NULL when there are not as many. */
const uint8_t *bs_span_take(struct bs_span *span, size_t length);

/* Take what bs_bytes_add_varint() wrote. False when the span ends before, or it does not fit 64 bits. */
bool bs_span_take_varint(struct bs_span *span, uint64_t *out);

/* The same for bs_bytes_add_difference(); sums are taken modulo 2^64. */
bool bs_span_take_difference(struct bs_span *span, uint64_t previous, uint64_t *out);

#endif
