/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "fiemap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 5000 };

static const struct bs_interrupt never = {.check = NULL};

struct map {
        struct fiemap_extent records[MOST];
        size_t count;
        uint64_t size;
        uint64_t at_once;
};

static void add(struct map *map, uint64_t logical, uint64_t physical, uint64_t length, uint32_t flags)
{
        map->records[map->count++] = (struct fiemap_extent){
                .fe_logical = logical, .fe_physical = physical, .fe_length = length, .fe_flags = flags};
}

/* The same, in pages. */
static void add_pages(struct map *map, uint64_t logical, uint64_t physical, uint64_t length, uint32_t flags)
{
        add(map, logical * PAGE, physical * PAGE, length * PAGE, flags);
}

static struct map *map_of(uint64_t pages)
{
        struct map *map = bs_alloc_zeroed(sizeof(*map));

        CHECK(map);
        map->size = pages * PAGE;
        map->at_once = UINT64_MAX;
        return map;
}

static int diff_with(const struct map *base, const struct map *later, const struct bs_interrupt *interrupt,
                     struct bs_error *error, struct bs_fiemap_diff *out)
{
        struct bs_fiemap_replay of_base = {(const uint8_t *)base->records, base->count, base->at_once};
        struct bs_fiemap_replay of_later = {(const uint8_t *)later->records, later->count, later->at_once};
        struct bs_fiemap maps[] = {
                {bs_fiemap_replay_source(&of_base), base->size},
                {bs_fiemap_replay_source(&of_later), later->size},
        };

        bs_fiemap_diff_deinit(out);
        return bs_fiemap_diff(&maps[0], &maps[1], interrupt, error, out);
}

static int diff(const struct map *base, const struct map *later, struct bs_fiemap_diff *out)
{
        struct bs_error error = {.call = NULL};

        return diff_with(base, later, &never, &error, out);
}

static void check_extent(const struct bs_extents *list, size_t index, uint64_t page, uint64_t pages)
{
        CHECK(index < list->count);
        CHECK_EQUAL(list->items[index].offset, page * PAGE);
        CHECK_EQUAL(list->items[index].length, pages * PAGE);
}

static void test_what_moved_came_and_went(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *base = map_of(100);
        _cleanup_free_ struct map *later = map_of(100);

        add_pages(base, 0, 1000, 50, FIEMAP_EXTENT_SHARED);
        add_pages(base, 60, 2000, 10, 0);
        add_pages(base, 90, 3000, 10, FIEMAP_EXTENT_LAST);
        add_pages(later, 0, 1000, 10, 0);
        add_pages(later, 10, 5000, 5, 0);
        add_pages(later, 15, 1015, 25, FIEMAP_EXTENT_SHARED);
        /* A hole at 40, then what was in the base before it. */
        add_pages(later, 50, 6000, 5, 0);
        add_pages(later, 60, 2001, 9, 0);
        add_pages(later, 69, 2009, 1, 0);
        add_pages(later, 90, 3000, 10, FIEMAP_EXTENT_LAST);
        for (uint64_t at_once = 1; at_once < 10; at_once++) {
                base->at_once = later->at_once = at_once;
                CHECK_EQUAL(diff(base, later, &found), 0);
                CHECK_EQUAL(found.changed.count, 3);
                check_extent(&found.changed, 0, 10, 5);
                check_extent(&found.changed, 1, 50, 5);
                check_extent(&found.changed, 2, 60, 9);
                CHECK_EQUAL(found.discarded.count, 1);
                check_extent(&found.discarded, 0, 40, 10);
                CHECK_EQUAL(found.base_records, 3);
                CHECK_EQUAL(found.records, 7);
        }
        CHECK_ALLOCATIONS(diff(base, later, &found));
}

static void test_how_records_are_cut_is_no_difference(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *base = map_of(MOST);
        _cleanup_free_ struct map *later = map_of(MOST);

        add_pages(base, 0, 7, MOST, 0);
        for (uint64_t page = 0; page < MOST; page++)
                add_pages(later, page, 7 + page, 1, FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED);
        for (int turn = 0; turn < 2; turn++) {
                CHECK_EQUAL(turn ? diff(later, base, &found) : diff(base, later, &found), 0);
                CHECK_EQUAL(found.changed.count + found.discarded.count, 0);
                CHECK_EQUAL(found.base_records + found.records, MOST + 1);
        }
}

static void test_unwritten_is_zeros(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *base = map_of(50);
        _cleanup_free_ struct map *later = map_of(50);

        add_pages(base, 0, 100, 10, FIEMAP_EXTENT_UNWRITTEN);
        add_pages(base, 10, 200, 10, FIEMAP_EXTENT_UNWRITTEN);
        add_pages(base, 20, 300, 10, 0);
        /* From unwritten to written at the same place, to another place, and to a hole. */
        add_pages(later, 0, 100, 5, 0);
        add_pages(later, 5, 400, 5, FIEMAP_EXTENT_UNWRITTEN);
        add_pages(later, 20, 300, 5, FIEMAP_EXTENT_UNWRITTEN);
        add_pages(later, 25, 305, 5, 0);
        add_pages(later, 40, 500, 5, FIEMAP_EXTENT_UNWRITTEN | FIEMAP_EXTENT_LAST);
        CHECK_EQUAL(diff(base, later, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        check_extent(&found.changed, 0, 0, 5);
        CHECK_EQUAL(found.discarded.count, 1);
        check_extent(&found.discarded, 0, 20, 5);
}

static void test_files_of_different_sizes(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *base = map_of(0);
        _cleanup_free_ struct map *later = map_of(0);

        add_pages(base, 0, 100, 20, 0);
        add_pages(later, 0, 100, 20, 0);
        /* Both have blocks beyond their ends, as XFS allocates ahead; the ends lie within a page. */
        base->size = 5 * PAGE + 100;
        later->size = 9 * PAGE + 7;
        CHECK_EQUAL(diff(base, later, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        CHECK_EQUAL(found.changed.items[0].offset, 5 * PAGE + 100);
        CHECK_EQUAL(found.changed.items[0].length, 4 * PAGE - 93);
        CHECK_EQUAL(diff(later, base, &found), 0);
        CHECK_EQUAL(found.changed.count + found.discarded.count, 0);

        later->count = 0;
        CHECK_EQUAL(diff(base, later, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        CHECK_EQUAL(found.discarded.items[0].length, 5 * PAGE + 100);
        CHECK_EQUAL(diff(later, base, &found), 0);
        CHECK_EQUAL(found.changed.items[0].length, 5 * PAGE + 100);
        base->size = 0;
        CHECK_EQUAL(diff(later, base, &found), 0);
        CHECK_EQUAL(found.changed.count + found.discarded.count, 0);
}

static void check_refused(const struct map *map, uint64_t offset, const char *reason)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *empty = map_of(0);
        struct bs_error error = {.call = NULL};

        empty->size = map->size;
        for (int turn = 0; turn < 2; turn++) {
                int result = turn ? diff_with(empty, map, &never, &error, &found)
                                  : diff_with(map, empty, &never, &error, &found);

                CHECK_EQUAL(result, -EUCLEAN);
                if (!strstr(error.reason, reason))
                        fprintf(stderr, "reason is: %s\n", error.reason);
                CHECK(strstr(error.reason, reason));
                CHECK_EQUAL(error.block, offset);
                CHECK_EQUAL(found.failed_in_base, !turn);
        }
}

static void test_every_flag(void)
{
        const uint32_t harmless =
                FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_UNWRITTEN | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED;

        for (uint32_t bit = 0; bit < 32; bit++) {
                _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
                _cleanup_free_ struct map *map = map_of(10);

                add_pages(map, 0, 100, 3, 0);
                add_pages(map, 3, 103, 3, UINT32_C(1) << bit);
                if (harmless >> bit & 1) {
                        CHECK_EQUAL(diff(map, map, &found), 0);
                        CHECK_EQUAL(found.changed.count + found.discarded.count, 0);
                } else {
                        check_refused(map, 3 * PAGE, "not just a place");
                }
        }
}

static void test_maps_that_make_no_sense(void)
{
        static const struct {
                struct fiemap_extent second;
                uint64_t size;
                const char *reason;
        } cases[] = {
                {{.fe_logical = 4096, .fe_physical = 0, .fe_length = 8192}, 1 << 20, "before the end"},
                {{.fe_logical = 8192, .fe_physical = 0, .fe_length = 4096}, 1 << 20, "before the end"},
                {{.fe_logical = 16384, .fe_physical = 0, .fe_length = 0}, 1 << 20, "empty"},
                {{.fe_logical = 16384 + 1, .fe_physical = 0, .fe_length = 512}, 1 << 20, "sectors"},
                {{.fe_logical = 16384, .fe_physical = 7, .fe_length = 512}, 1 << 20, "sectors"},
                {{.fe_logical = 16384, .fe_physical = 0, .fe_length = 100}, 1 << 20, "sectors"},
                {{.fe_logical = -4096ULL, .fe_physical = 0, .fe_length = 8192}, UINT64_MAX, "2^64"},
                {{.fe_logical = -4096ULL, .fe_physical = 0, .fe_length = 4096}, UINT64_MAX, "2^64"},
                {{.fe_logical = 16384, .fe_physical = -512ULL, .fe_length = 4096}, 1 << 20, "2^64"},
                {{.fe_logical = 16384, .fe_physical = 0, .fe_length = -512ULL}, 1 << 20, "2^64"},
        };

        for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
                _cleanup_free_ struct map *map = map_of(0);

                map->size = cases[i].size;
                map->at_once = 1 + i % 2;
                add(map, 8192, 4096, 8192, 0);
                map->records[map->count++] = cases[i].second;
                check_refused(map, cases[i].second.fe_logical, cases[i].reason);
        }
}

static void test_huge_offsets(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *base = map_of(0);
        _cleanup_free_ struct map *later = map_of(0);

        base->size = later->size = UINT64_MAX;
        add(base, 0, UINT64_MAX - 8191, 4096, 0);
        add(base, -8192ULL, 512, 4096, 0);
        add(later, 4096, 4096, -16384ULL, 0);
        CHECK_EQUAL(diff(base, later, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        CHECK_EQUAL(found.discarded.count, 2);
        CHECK(found.discarded.items[1].offset == -8192ULL);
}

/* LAST is that of the range that was asked for; only an answer without records is the end. */
static void test_last_is_not_believed(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *map = map_of(10);
        _cleanup_free_ struct map *never_last = map_of(10);

        for (uint64_t page = 0; page < 10; page += 2) {
                add_pages(map, page, page, 1, FIEMAP_EXTENT_LAST);
                add_pages(never_last, page, page, 1, 0);
        }
        map->at_once = 1;
        CHECK_EQUAL(diff(map, never_last, &found), 0);
        CHECK_EQUAL(found.changed.count + found.discarded.count, 0);
        CHECK_EQUAL(found.base_records, 5);
}

struct script {
        int asked;
        int result;
        uint32_t mapped;
        struct fiemap_extent record;
        struct fiemap last; /* ends in an array, so it is last here too */
};

static int follow(void *context, struct fiemap *request)
{
        struct script *script = context;

        script->asked++;
        script->last = *request;
        request->fm_mapped_extents = script->mapped;
        if (script->mapped <= 2)
                request->fm_extents[0] = request->fm_extents[1] = script->record;
        return script->result;
}

/* One page where it was asked for, again and again. */
static int one_page(void *context, struct fiemap *request)
{
        struct script *script = context;

        CHECK_EQUAL(request->fm_flags, script->asked ? 0 : FIEMAP_FLAG_SYNC);
        CHECK_EQUAL(request->fm_start, (uint64_t)script->asked * PAGE);
        CHECK_EQUAL(request->fm_start + request->fm_length, 10 * PAGE);
        script->asked++;
        request->fm_extents[0] = (struct fiemap_extent){
                .fe_logical = request->fm_start, .fe_physical = request->fm_start, .fe_length = PAGE};
        request->fm_mapped_extents = 1;
        return 0;
}

static void test_how_the_kernel_is_asked(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        struct script of_base = {.asked = 0};
        struct script of_later = {.asked = 0};
        struct bs_fiemap base = {{one_page, &of_base}, 10 * PAGE};
        struct bs_fiemap later = {{one_page, &of_later}, 10 * PAGE};
        struct bs_error error = {.call = NULL};

        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), 0);
        CHECK_EQUAL(of_base.asked, 10);
        CHECK_EQUAL(of_later.asked, 10);

        of_base = (struct script){.result = -EOPNOTSUPP};
        base.source.ask = follow;
        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), -EOPNOTSUPP);
        CHECK(strstr(error.call, "FIEMAP"));
        CHECK(found.failed_in_base);
        of_base = (struct script){.mapped = BS_FIEMAP_RECORDS + 1};
        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), -EUCLEAN);
        CHECK(strstr(error.reason, "more extents"));
        /* A full answer of records that nobody filled in. */
        of_base = (struct script){.mapped = BS_FIEMAP_RECORDS};
        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), -EUCLEAN);
        CHECK_EQUAL(of_base.last.fm_extent_count, BS_FIEMAP_RECORDS);
        /* What nobody asked for. */
        of_base = (struct script){.mapped = 1, .record = {.fe_logical = 10 * PAGE, .fe_length = PAGE}};
        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), -EUCLEAN);
        CHECK(strstr(error.reason, "beyond the range"));
        /* An answer that ends with an extent to the end of the file, and has another one behind it. */
        of_base = (struct script){.mapped = 2, .record = {.fe_logical = 0, .fe_length = 10 * PAGE}};
        CHECK_EQUAL(bs_fiemap_diff(&base, &later, &never, &error, &found), -EUCLEAN);
        CHECK(strstr(error.reason, "before the end"));
}

static int stop_at_third(void *context)
{
        return ++*(int *)context == 3;
}

static void test_interrupt(void)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found = {.records = 0};
        _cleanup_free_ struct map *map = map_of(10);
        struct bs_error error = {.call = NULL};
        int asked = 0;
        struct bs_interrupt stop = {.check = stop_at_third, .context = &asked};

        map->at_once = 1;
        for (uint64_t page = 0; page < 10; page++)
                add_pages(map, page, page, 1, 0);
        CHECK_EQUAL(diff_with(map, map, &stop, &error, &found), -EINTR);
        CHECK_EQUAL(asked, 3);
}

static void test_only_files_on_xfs(void)
{
        struct bs_error error = {.call = NULL};
        struct bs_fiemap maps[2];
        int memory = memfd_create("file", MFD_CLOEXEC);
        int folder = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int bad = -1;

        CHECK(memory >= 0 && folder >= 0);
        CHECK_EQUAL(bs_fiemap_of_files(&memory, &memory, &error, &maps[0], &maps[1]), -ERANGE);
        CHECK(strstr(error.reason, "not on XFS"));
        CHECK_EQUAL(bs_fiemap_of_files(&folder, &memory, &error, &maps[0], &maps[1]), -ERANGE);
        CHECK(strstr(error.reason, "not a regular file"));
        CHECK_EQUAL(bs_fiemap_of_files(&bad, &memory, &error, &maps[0], &maps[1]), -EBADF);
        CHECK(strcmp(error.call, "fstat") == 0);
        close(memory);
        close(folder);
}

int main(void)
{
        test_what_moved_came_and_went();
        test_how_records_are_cut_is_no_difference();
        test_unwritten_is_zeros();
        test_files_of_different_sizes();
        test_every_flag();
        test_maps_that_make_no_sense();
        test_huge_offsets();
        test_last_is_not_believed();
        test_how_the_kernel_is_asked();
        test_interrupt();
        test_only_files_on_xfs();
        return 0;
}
