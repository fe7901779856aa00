/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cow.h"
#include "extent.h"

#include <endian.h>

enum { CHUNK = 4096, PER_AREA = CHUNK / BS_COW_ENTRY_SIZE, STRIDE = PER_AREA + 1 };

static const struct bs_interrupt never = {.check = NULL};

/* A -cow device in memory, filled as the kernel fills it. */
struct store {
        uint8_t *bytes;
        size_t size;
        size_t chunk_size;
        uint64_t added;
        int reads;
        uint64_t bad_chunk;                            /* not 0: cannot be read */
        void (*hook)(struct store *, uint64_t offset); /* called before each read */
};

static void poke32(struct store *store, size_t offset, uint32_t value)
{
        value = htole32(value);
        memcpy(store->bytes + offset, &value, sizeof(value));
}

static void poke64(struct store *store, size_t offset, uint64_t value)
{
        value = htole64(value);
        memcpy(store->bytes + offset, &value, sizeof(value));
}

static struct store *store_create(size_t chunk_size, size_t chunks)
{
        struct store *store = calloc(1, sizeof(*store));

        CHECK(store);
        store->chunk_size = chunk_size;
        store->size = chunk_size * chunks;
        store->bytes = calloc(1, store->size);
        CHECK(store->bytes);
        /* What the device held before. */
        memset(store->bytes, 0xa5, store->size);
        memset(store->bytes, 0, chunk_size * 2);
        poke32(store, 0, 0x70416e53);
        poke32(store, 4, 1);
        poke32(store, 8, 1);
        poke32(store, 12, (uint32_t)(chunk_size / 512));
        return store;
}

static void store_destroy(struct store *store)
{
        free(store->bytes);
        free(store);
}

static uint64_t per_area(const struct store *store)
{
        return store->chunk_size / BS_COW_ENTRY_SIZE;
}

/* Where entry `index` of the whole list is. */
static size_t entry_offset(const struct store *store, uint64_t index)
{
        uint64_t area = index / per_area(store);
        uint64_t chunk = 1 + area * (per_area(store) + 1);

        return (size_t)(chunk * store->chunk_size + index % per_area(store) * BS_COW_ENTRY_SIZE);
}

static void set_entry(struct store *store, uint64_t index, uint64_t from, uint64_t to)
{
        poke64(store, entry_offset(store, index), from);
        poke64(store, entry_offset(store, index) + 8, to);
}

/* Append an exception. The kernel clears the next area before it writes the last entry of one. */
static void store_add(struct store *store, uint64_t from)
{
        uint64_t index = store->added++;
        uint64_t area = index / per_area(store);
        uint64_t to = 2 + area * (per_area(store) + 1) + index % per_area(store);

        if (store->added % per_area(store) == 0)
                memset(store->bytes + entry_offset(store, store->added), 0, store->chunk_size);
        set_entry(store, index, from, to);
}

static int read_store(void *context, uint64_t offset, void *buffer, size_t length)
{
        struct store *store = context;

        CHECK(offset % BS_IO_ALIGNMENT == 0 && length % BS_IO_ALIGNMENT == 0);
        CHECK((uintptr_t)buffer % BS_IO_ALIGNMENT == 0);
        CHECK(offset + length <= store->size);
        store->reads++;
        if (store->bad_chunk && offset / store->chunk_size == store->bad_chunk)
                return -EIO;
        if (store->hook)
                store->hook(store, offset);
        memcpy(buffer, store->bytes + offset, length);
        return 0;
}

static int scan_with(struct store *store, uint64_t origin_size, uint64_t settled,
                     const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_cow_result *out)
{
        struct bs_reader reader = {
                .read = read_store, .context = store, .call = "pread", .size = store->size};
        struct bs_cow_scan scan = {.origin_size = origin_size, .settled_areas = settled, .attempts = 4};

        *error = (struct bs_error){.call = NULL};
        return bs_cow_scan(&reader, &scan, interrupt, error, out);
}

static void check_refused_settled(struct store *store, uint64_t settled, uint64_t block, const char *reason)
{
        struct bs_cow_result result;
        struct bs_error error;

        CHECK_EQUAL(scan_with(store, 0, settled, &never, &error, &result), -EUCLEAN);
        if (!strstr(error.reason, reason))
                fprintf(stderr, "reason is: %s\n", error.reason);
        CHECK(strstr(error.reason, reason));
        CHECK_EQUAL(error.block, block);
        bs_cow_result_deinit(&result);
}

static void check_refused(struct store *store, uint64_t block, const char *reason)
{
        check_refused_settled(store, 0, block, reason);
}

/* The extents of a scan that has to succeed, as they are packed. */
static size_t extents_of(struct store *store, uint64_t origin_size, uint64_t settled, uint64_t *pairs)
{
        struct bs_cow_result result;
        struct bs_error error;

        CHECK_EQUAL(scan_with(store, origin_size, settled, &never, &error, &result), 0);
        CHECK_EQUAL(result.count, store->added);

        size_t count = bs_cow_extent_count(&result);

        bs_cow_extents_pack(&result, (uint8_t *)pairs);
        for (size_t i = 0; i < count * 2; i++)
                pairs[i] = le64toh(pairs[i]);
        bs_cow_result_deinit(&result);
        return count;
}

static void test_a_new_store_is_empty(void)
{
        struct store *store = store_create(CHUNK, 10);
        struct bs_cow_result result;
        struct bs_error error;

        CHECK_EQUAL(scan_with(store, 0, 0, &never, &error, &result), 0);
        CHECK_EQUAL(result.chunk_size, CHUNK);
        CHECK_EQUAL(result.count, 0);
        CHECK_EQUAL(result.areas, 1);
        CHECK_EQUAL(result.allocated, 2);
        CHECK_EQUAL(bs_cow_extent_count(&result), 0);
        bs_cow_result_deinit(&result);
        store_destroy(store);
}

static void test_extents_are_sorted_merged_and_clipped(void)
{
        struct store *store = store_create(CHUNK, 20);
        uint64_t pairs[12];
        const uint64_t order[] = {9, 3, 4, 100, 0, 2};

        for (size_t i = 0; i < 6; i++)
                store_add(store, order[i]);
        CHECK_EQUAL(extents_of(store, 0, 0, pairs), 4);
        const uint64_t whole[] = {0, CHUNK, 2 * CHUNK, 3 * CHUNK, 9 * CHUNK, CHUNK, 100 * CHUNK, CHUNK};
        CHECK(memcmp(pairs, whole, sizeof(whole)) == 0);
        /* The last chunk of the origin is a partial one. */
        CHECK_EQUAL(extents_of(store, 100 * CHUNK + 512, 0, pairs), 4);
        CHECK_EQUAL(pairs[7], 512);
        store_destroy(store);
}

/* Every number of exceptions around the ends of areas, each with all numbers of settled areas. */
static void test_areas_follow_each_other(void)
{
        struct store *store = store_create(CHUNK, 4 * STRIDE + 2);
        uint64_t pairs[8 * PER_AREA];

        for (uint64_t added = 1; added <= 4 * PER_AREA; added++) {
                store_add(store, 5000 - 2 * added);
                if (added % PER_AREA > 1 && added % PER_AREA < PER_AREA - 1)
                        continue;
                for (uint64_t settled = 0; settled <= added / PER_AREA; settled++) {
                        struct bs_cow_result result;
                        struct bs_error error;

                        CHECK_EQUAL(extents_of(store, 5000 * CHUNK, settled, pairs), added);
                        CHECK_EQUAL(pairs[0], (5000 - 2 * added) * CHUNK);
                        CHECK_EQUAL(pairs[2 * added - 2], 4998 * CHUNK);
                        CHECK_EQUAL(scan_with(store, 0, settled, &never, &error, &result), 0);
                        CHECK_EQUAL(result.areas, added / PER_AREA + 1);
                        /* Header, areas, exceptions: what the kernel's status says. */
                        CHECK_EQUAL(result.allocated, 1 + result.areas + added);
                        bs_cow_result_deinit(&result);
                }
        }
        store_destroy(store);
}

static void test_every_chunk_size(void)
{
        for (size_t chunk_size = 4096; chunk_size <= 512 << 10; chunk_size *= 2) {
                struct store *store = store_create(chunk_size, 8);
                uint64_t pairs[8];

                store_add(store, 7);
                store_add(store, 1);
                CHECK_EQUAL(extents_of(store, 7 * chunk_size + 1024, 0, pairs), 2);
                CHECK_EQUAL(pairs[0], chunk_size);
                CHECK_EQUAL(pairs[2], 7 * chunk_size);
                CHECK_EQUAL(pairs[3], 1024);
                store_destroy(store);
        }
}

/* What the kernel's order of allocating and committing may leave after a crash: a chunk nobody uses. */
static void test_holes_in_the_store_count_as_allocated(void)
{
        struct store *store = store_create(CHUNK, 20);
        struct bs_cow_result result;
        struct bs_error error;

        set_entry(store, 0, 5, 9);
        set_entry(store, 1, 6, 3);
        CHECK_EQUAL(scan_with(store, 0, 0, &never, &error, &result), 0);
        CHECK_EQUAL(result.count, 2);
        CHECK_EQUAL(result.allocated, 10);
        bs_cow_result_deinit(&result);
        store_destroy(store);
}

static void check_header_refused(size_t offset, uint32_t value, const char *reason)
{
        struct store *store = store_create(CHUNK, 10);

        poke32(store, offset, value);
        check_refused(store, 0, reason);
        store_destroy(store);
}

static void test_headers(void)
{
        check_header_refused(0, 0, "never initialised");
        check_header_refused(0, 0x70416e54, "not the exception store");
        check_header_refused(4, 0, "has invalidated");
        check_header_refused(4, 2, "neither valid nor invalid");
        check_header_refused(8, 0, "unknown version");
        check_header_refused(8, 2, "unknown version");
        for (uint32_t sectors = 0; sectors < 4096; sectors++)
                if (sectors < 8 || sectors > 1024 || (sectors & (sectors - 1)))
                        check_header_refused(12, sectors, "chunk size");
        check_header_refused(12, UINT32_MAX, "chunk size");

        struct store *store = store_create(CHUNK, 10);

        store->size = CHUNK - 1;
        check_refused(store, 0, "too small");
        store_destroy(store);
}

static void test_truncated_devices(void)
{
        struct store *store = store_create(CHUNK, 2 * STRIDE + 2);

        for (uint64_t i = 0; i < PER_AREA; i++)
                store_add(store, i);
        /* One chunk short of the second area, and an area cut in the middle. */
        store->size = (STRIDE + 1) * CHUNK;
        check_refused(store, STRIDE + 1, "ends before the list");
        store->size += CHUNK - 512;
        check_refused(store, STRIDE + 1, "ends before the list");
        check_refused_settled(store, 2, STRIDE + 1, "ends before the list");
        check_refused_settled(store, UINT64_MAX, STRIDE + 1, "ends before the list");
        store->size = CHUNK;
        check_refused(store, 1, "ends before the list");
        store_destroy(store);
}

static void test_hostile_entries(void)
{
        struct store *store = store_create(CHUNK, STRIDE + 10);

        set_entry(store, 0, 1, STRIDE + 9);
        set_entry(store, 1, 2, STRIDE + 10);
        check_refused(store, 1, "beyond the end of the device");
        set_entry(store, 1, 2, UINT64_MAX);
        check_refused(store, 1, "beyond the end of the device");
        set_entry(store, 1, 2, 1);
        check_refused(store, 1, "at the list itself");
        set_entry(store, 1, 2, 1 + STRIDE);
        check_refused(store, 1, "at the list itself");
        set_entry(store, 1, UINT64_MAX, 4);
        check_refused(store, 1, "beyond the end of the origin");
        set_entry(store, 1, INT64_MAX / CHUNK + 1, 4);
        check_refused(store, 1, "beyond the end of the origin");
        set_entry(store, 1, 1, 4);
        check_refused(store, 1, "this chunk of the origin twice");
        /* What comes after the end: an entry, one without a place, and the last in the area. */
        set_entry(store, 1, 0, 0);
        set_entry(store, 2, 2, 4);
        check_refused(store, 1, "written in part");
        set_entry(store, 2, 0, 0);
        set_entry(store, 1, 2, 0);
        check_refused(store, 1, "written in part");
        set_entry(store, 1, 0, 0);
        set_entry(store, PER_AREA - 1, 2, 4);
        check_refused(store, 1, "written in part");
        store_destroy(store);
}

static void test_the_origin_has_an_end(void)
{
        struct store *store = store_create(CHUNK, 10);
        struct bs_cow_result result;
        struct bs_error error;
        uint64_t pairs[2];

        store_add(store, 100);
        CHECK_EQUAL(extents_of(store, 101 * CHUNK, 0, pairs), 1);
        CHECK_EQUAL(extents_of(store, 100 * CHUNK + 1, 0, pairs), 1);
        CHECK_EQUAL(scan_with(store, 100 * CHUNK, 0, &never, &error, &result), -EUCLEAN);
        CHECK(strstr(error.reason, "beyond the end of the origin"));
        bs_cow_result_deinit(&result);
        CHECK_EQUAL(scan_with(store, (uint64_t)INT64_MAX + 1, 0, &never, &error, &result), -ERANGE);
        bs_cow_result_deinit(&result);
        /* The last chunk there can be. */
        set_entry(store, 0, INT64_MAX / CHUNK, 2);
        CHECK_EQUAL(extents_of(store, INT64_MAX, 0, pairs), 1);
        CHECK_EQUAL(pairs[0] + pairs[1], INT64_MAX);
        store_destroy(store);
}

static void test_a_settled_area_that_is_not_full(void)
{
        struct store *store = store_create(CHUNK, 4 * STRIDE + 2);

        for (uint64_t i = 0; i < 3 * PER_AREA - 1; i++)
                store_add(store, i);
        check_refused_settled(store, 3, 1 + 2 * STRIDE, "shorter than the kernel has said");
        store_destroy(store);
}

static void test_read_errors(void)
{
        struct store *store = store_create(CHUNK, 4 * STRIDE + 2);
        struct bs_cow_result result;
        struct bs_error error;

        for (uint64_t i = 0; i < 3 * PER_AREA; i++)
                store_add(store, i);
        store->bad_chunk = 1 + STRIDE;
        for (uint64_t settled = 0; settled <= 3; settled++) {
                CHECK_EQUAL(scan_with(store, 0, settled, &never, &error, &result), -EIO);
                CHECK(strcmp(error.call, "pread") == 0);
                bs_cow_result_deinit(&result);
        }
        store_destroy(store);
}

/* The kernel writes on while the list is read: the area in front is full by the time this one is read. */
static void fill_first_area(struct store *store, uint64_t offset)
{
        while (offset == CHUNK && store->added < PER_AREA + 3)
                store_add(store, store->added);
}

static void test_an_area_is_not_read_before_the_one_in_front_is_full(void)
{
        struct store *store = store_create(CHUNK, 2 * STRIDE + 2);
        uint64_t pairs[2];

        for (uint64_t i = 0; i < PER_AREA - 1; i++)
                store_add(store, i);
        store->hook = fill_first_area;
        CHECK_EQUAL(extents_of(store, 0, 0, pairs), 1);
        CHECK_EQUAL(pairs[1], (PER_AREA + 3) * CHUNK);
        store_destroy(store);
}

/* The second of two sectors reaches the medium first; the first one does when it is read for the third time.
 */
static void mend_at_third_read(struct store *store, uint64_t offset)
{
        if (offset == CHUNK && store->reads == 4)
                set_entry(store, 1, 11, 3);
}

static void test_an_area_in_mid_write_is_read_again(void)
{
        struct store *store = store_create(CHUNK, 10);
        uint64_t pairs[2];

        set_entry(store, 0, 10, 2);
        set_entry(store, 2, 12, 4);
        store->added = 3;
        store->hook = mend_at_third_read;
        CHECK_EQUAL(extents_of(store, 0, 0, pairs), 1);
        CHECK_EQUAL(pairs[1], 3 * CHUNK);
        store_destroy(store);
}

static void invalidate(struct store *store, uint64_t offset)
{
        if (offset == CHUNK)
                poke32(store, 4, 0);
}

static void replace(struct store *store, uint64_t offset)
{
        if (offset == CHUNK)
                poke32(store, 12, 16);
}

static void test_a_store_that_changes_meanwhile(void)
{
        struct store *store = store_create(CHUNK, 10);

        store->hook = invalidate;
        check_refused(store, 0, "has invalidated");
        store_destroy(store);
        store = store_create(CHUNK, 10);
        store->hook = replace;
        check_refused(store, 0, "was replaced while");
        store_destroy(store);
}

static int stop_at_second(void *context)
{
        return ++*(int *)context == 2;
}

static void test_interrupt(void)
{
        struct store *store = store_create(CHUNK, 6 * STRIDE + 2);
        struct bs_cow_result result;
        struct bs_error error;

        for (uint64_t i = 0; i < 5 * PER_AREA; i++)
                store_add(store, i);
        for (uint64_t settled = 0; settled <= 5; settled++) {
                int asked = 0;
                struct bs_interrupt stop = {.check = stop_at_second, .context = &asked};

                CHECK_EQUAL(scan_with(store, 0, settled, &stop, &error, &result), -EINTR);
                CHECK_EQUAL(asked, 2);
                bs_cow_result_deinit(&result);
        }
        store_destroy(store);
}

static int scan_once(struct store *store)
{
        struct bs_cow_result result;
        struct bs_error error;
        int status = scan_with(store, 0, 1, &never, &error, &result);

        bs_cow_result_deinit(&result);
        return status;
}

static void test_allocations(void)
{
        struct store *store = store_create(CHUNK, 10 * STRIDE + 2);

        for (uint64_t i = 0; i < 9 * PER_AREA + 1; i++)
                store_add(store, i * 7919 % 10007);
        CHECK_ALLOCATIONS(scan_once(store));
        store_destroy(store);
}

int main(void)
{
        test_a_new_store_is_empty();
        test_extents_are_sorted_merged_and_clipped();
        test_areas_follow_each_other();
        test_every_chunk_size();
        test_holes_in_the_store_count_as_allocated();
        test_headers();
        test_truncated_devices();
        test_hostile_entries();
        test_the_origin_has_an_end();
        test_a_settled_area_that_is_not_full();
        test_read_errors();
        test_an_area_is_not_read_before_the_one_in_front_is_full();
        test_an_area_in_mid_write_is_read_again();
        test_a_store_that_changes_meanwhile();
        test_interrupt();
        test_allocations();
        return 0;
}
