/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scan a metadata image that anybody may have written.
 *
 * The input is one byte of options and then the image. Mutations of a block hardly ever keep its checksum,
 * so the reader can mend checksums and block numbers on the way: then the checks behind them are reached.
 */
#include "bitmap.h"
#include "cleanup.h"
#include "thin_scan.h"

#include <stdlib.h>

enum {
        MEND_CHECKSUMS = 1,
        MEND_NUMBERS = 2,
        SINCE_SHIFT = 2, /* the other six bits are the time since when */

        MAX_BLOCKS = 64,
        CHUNKS = 5000,
};

struct memory {
        const uint8_t *image;
        uint8_t options;
};

static void store(uint8_t *to, uint64_t value, size_t size)
{
        value = htole64(value);
        memcpy(to, &value, size);
}

static void mend(uint8_t *block, uint64_t number, uint8_t options)
{
        if (options & MEND_NUMBERS)
                store(block + 8, number, 8);
        if (options & MEND_CHECKSUMS)
                store(block, bs_thin_checksum(block, number ? BS_THIN_NODE_SALT : BS_THIN_SUPERBLOCK_SALT),
                      4);
}

static int read_memory(void *context, uint64_t offset, void *buffer, size_t length)
{
        const struct memory *memory = context;

        memcpy(buffer, memory->image + offset, length);
        for (size_t at = 0; at < length; at += BS_THIN_BLOCK_SIZE)
                mend((uint8_t *)buffer + at, (offset + at) / BS_THIN_BLOCK_SIZE, memory->options);
        return 0;
}

/* What must hold of every answer: changed chunks are mapped, and all lie within the volume. */
static void check_answer(const struct bs_thin_scan *scan, const struct bs_thin_scan_result *result,
                         size_t bytes)
{
        uint64_t mapped = 0;

        for (size_t i = 0; i < bytes; i++) {
                if (scan->changed[i] & ~scan->mapped[i])
                        abort();
                mapped += (unsigned)__builtin_popcount(scan->mapped[i]);
        }
        if (mapped > result->mappings || result->mappings != result->view.device.mapped_blocks)
                abort();

        size_t runs = bs_bitmap_runs(scan->mapped, bytes);
        _cleanup_free_ uint8_t *packed = bs_alloc_zeroed(runs * 16);

        if (!packed ||
            bs_bitmap_extents(scan->mapped, bytes, 0, result->view.superblock.chunk_size, packed) < 0)
                abort();
}

/* What is found in one go is found in two windows. */
static void check_windows(const struct bs_reader *reader, const struct bs_thin_scan *whole,
                          const struct bs_thin_scan_result *result)
{
        enum { HALF = CHUNKS / 16 * 8 };
        const struct bs_interrupt never = {.check = NULL};
        size_t bytes = (size_t)bs_bitmap_bytes(CHUNKS);
        _cleanup_free_ uint8_t *mapped = bs_alloc_zeroed(bytes);
        _cleanup_free_ uint8_t *changed = bs_alloc_zeroed(bytes);
        struct bs_thin_scan scan = *whole;
        struct bs_thin_scan_result parts[2];
        struct bs_error error = {.call = NULL};

        if (!mapped || !changed)
                abort();
        scan.mapped = mapped;
        scan.changed = changed;
        scan.nr_chunks = HALF;
        scan.more = true;
        if (bs_thin_scan(reader, &scan, &never, &error, &parts[0]) < 0)
                abort();
        scan.mapped += HALF / 8;
        scan.changed += HALF / 8;
        scan.first = HALF;
        scan.nr_chunks = CHUNKS - HALF;
        scan.more = false;
        if (bs_thin_scan(reader, &scan, &never, &error, &parts[1]) < 0)
                abort();
        if (memcmp(mapped, whole->mapped, bytes) != 0 || memcmp(changed, whole->changed, bytes) != 0 ||
            parts[0].mappings + parts[1].mappings != result->mappings)
                abort();
}

static void scan_device(const struct bs_reader *reader, uint64_t device_id, uint64_t since)
{
        const struct bs_interrupt never = {.check = NULL};
        size_t bytes = (size_t)bs_bitmap_bytes(CHUNKS);
        _cleanup_free_ uint8_t *mapped = bs_alloc_zeroed(bytes);
        _cleanup_free_ uint8_t *changed = bs_alloc_zeroed(bytes);
        struct bs_thin_scan scan = {
                .device_id = device_id,
                .since = since,
                .nr_chunks = CHUNKS,
                .mapped = mapped,
                .changed = changed,
        };
        struct bs_thin_scan_result result;
        struct bs_error error = {.call = NULL};

        if (!mapped || !changed)
                abort();

        int status = bs_thin_scan(reader, &scan, &never, &error, &result);

        if (status == 0) {
                check_answer(&scan, &result, bytes);
                check_windows(reader, &scan, &result);
        } else if (status == -EUCLEAN || status == -ERANGE ? !error.reason : status != -ENOKEY)
                abort();
}

static bool superblock_is_good(const struct bs_reader *reader)
{
        uint8_t block[BS_THIN_BLOCK_SIZE];
        struct bs_thin_superblock superblock;
        struct bs_error error;

        if (reader->size < sizeof(block) || reader->read(reader->context, 0, block, sizeof(block)) < 0)
                return false;
        return bs_thin_superblock_parse(block, 0, &error, &superblock) == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        if (size < 1 || size > 1 + MAX_BLOCKS * BS_THIN_BLOCK_SIZE)
                return 0;

        struct memory memory = {.image = data + 1, .options = data[0]};
        struct bs_reader reader = {
                .read = read_memory,
                .context = &memory,
                .call = "read_memory",
                .size = size - 1,
        };

        /* A bad block 0 is waited for, which a fuzzer has no time for. */
        if (!superblock_is_good(&reader))
                return 0;
        for (uint64_t device_id = 1; device_id <= 2; device_id++)
                scan_device(&reader, device_id, data[0] >> SINCE_SHIFT);
        return 0;
}
