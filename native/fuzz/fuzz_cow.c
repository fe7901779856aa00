/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scan an exception store that anybody may have written.
 *
 * The areas of a store are a megabyte and more apart, and nothing in between is read: the input is the
 * header's four numbers and the areas, one after the other, and the reader puts them where they belong. In
 * front come the size of the device and of the origin, in chunks, and the number of settled areas. The answer
 * is checked against a plain walk of the same bytes: the list that the kernel would read is all in it, or it
 * is refused.
 */
#include "cow.h"

#include "cleanup.h"
#include "extent.h"

#include <endian.h>
#include <stdbool.h>
#include <stdlib.h>

enum { OPTIONS_SIZE = 8, HEADER_SIZE = 16 };

struct memory {
        const uint8_t *data; /* header, areas */
        size_t size;
        uint64_t chunk_size;
        uint64_t reads;
};

static uint64_t load(const uint8_t *from, size_t size)
{
        uint64_t value = 0;

        memcpy(&value, from, size);
        return le64toh(value);
}

/* The bytes from `at` on, zeros where the input has ended. */
static void copy(const struct memory *memory, uint64_t at, uint8_t *to, size_t length)
{
        memset(to, 0, length);
        if (at < memory->size)
                memcpy(to, memory->data + at,
                       memory->size - at < length ? memory->size - (size_t)at : length);
}

static int read_memory(void *context, uint64_t offset, void *buffer, size_t length)
{
        struct memory *memory = context;

        if (offset == 0) {
                memset(buffer, 0, length);
                copy(memory, 0, buffer, HEADER_SIZE);
                return 0;
        }

        uint64_t stride = memory->chunk_size / BS_COW_ENTRY_SIZE + 1;
        uint64_t chunk = offset / memory->chunk_size;

        if (length != memory->chunk_size || offset % memory->chunk_size || chunk % stride != 1)
                abort();
        memory->reads++;
        copy(memory, HEADER_SIZE + chunk / stride * memory->chunk_size, buffer, length);
        return 0;
}

static bool has(const struct bs_cow_result *result, uint64_t chunk)
{
        size_t low = 0;
        size_t high = result->count;

        while (low < high) {
                size_t middle = low + (high - low) / 2;

                if (result->chunks[middle] < chunk)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low < result->count && result->chunks[low] == chunk;
}

/* The list ends at the first entry without a place: all before it are in the answer, and nothing else is. */
static void check_complete(const struct memory *memory, const struct bs_cow_result *result)
{
        uint64_t count = 0;

        for (;; count++) {
                uint8_t entry[BS_COW_ENTRY_SIZE];

                copy(memory, HEADER_SIZE + count * BS_COW_ENTRY_SIZE, entry, sizeof(entry));
                if (load(entry + 8, 8) == 0)
                        break;
                if (!has(result, load(entry, 8)))
                        abort();
        }
        if (count != result->count)
                abort();
}

static void check_extents(const struct bs_cow_result *result)
{
        size_t count = bs_cow_extent_count(result);
        _cleanup_free_ uint8_t *packed = bs_alloc_zeroed(count * BS_PACKED_EXTENT_SIZE);
        uint64_t end = 0;
        uint64_t total = 0;

        if (!packed)
                abort();
        bs_cow_extents_pack(result, packed);
        for (size_t i = 0; i < count; i++) {
                uint64_t offset = load(packed + i * BS_PACKED_EXTENT_SIZE, 8);
                uint64_t length = load(packed + i * BS_PACKED_EXTENT_SIZE + 8, 8);

                if (length == 0 || (i > 0 && offset <= end) || length > result->origin_size ||
                    offset > result->origin_size - length)
                        abort();
                end = offset + length;
                total += (length + result->chunk_size - 1) / result->chunk_size;
        }
        if (total != result->count)
                abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        const struct bs_interrupt never = {.check = NULL};

        if (size < OPTIONS_SIZE + HEADER_SIZE)
                return 0;

        uint64_t sectors = load(data + OPTIONS_SIZE + 12, 4);
        struct memory memory = {
                .data = data + OPTIONS_SIZE,
                .size = size - OPTIONS_SIZE,
                .chunk_size = sectors * 512,
        };
        struct bs_reader reader = {
                .read = read_memory,
                .context = &memory,
                .call = "read_memory",
                .size = load(data, 3) * 4096 + data[7] % 2 * 512,
        };
        struct bs_cow_scan scan = {
                .origin_size = load(data + 3, 3) * 1024,
                .settled_areas = data[6],
        };
        struct bs_cow_result result;
        struct bs_error error = {.call = NULL};
        int status = bs_cow_scan(&reader, &scan, &never, &error, &result);

        if (status == 0) {
                check_complete(&memory, &result);
                check_extents(&result);
                if (result.areas != memory.reads)
                        abort();
        } else if (status != -EUCLEAN || !error.reason) {
                abort();
        }
        bs_cow_result_deinit(&result);
        return 0;
}
