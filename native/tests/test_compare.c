/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "compare.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, MIB = 1 << 20 };

static const struct bs_interrupt never = {.check = NULL};

static int file_of(off_t size)
{
        int fd = memfd_create("file", MFD_CLOEXEC);

        CHECK(fd >= 0);
        CHECK_EQUAL(ftruncate(fd, size), 0);
        return fd;
}

static void fill(int fd, char byte, off_t offset, size_t length)
{
        _cleanup_free_ char *bytes = bs_realloc(NULL, length, 1);

        CHECK(bytes);
        memset(bytes, byte, length);
        CHECK_EQUAL(pwrite(fd, bytes, length, offset), length);
}

static int compare(int base, int later, uint64_t block_size, struct bs_compare_result *out)
{
        struct bs_compare request = {.base_fd = base, .later_fd = later, .block_size = block_size};
        struct bs_error error = {.call = NULL};

        bs_compare_result_deinit(out);
        return bs_compare(&request, &never, &error, out);
}

static void check_extent(const struct bs_compare_result *found, size_t index, uint64_t offset,
                         uint64_t length)
{
        CHECK(index < found->changed.count);
        CHECK_EQUAL(found->changed.items[index].offset, offset);
        CHECK_EQUAL(found->changed.items[index].length, length);
}

static void test_blocks_that_differ(void)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        int base = file_of(3 * MIB);
        int later = file_of(3 * MIB);

        fill(base, 'a', 0, 2 * MIB);
        fill(later, 'a', 0, 2 * MIB);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        CHECK_EQUAL(found.base_bytes, 2 * MIB);
        CHECK_EQUAL(found.later_bytes, 2 * MIB);
        /* One byte each: the last of a page, the first of the next, across windows, and in a hole. */
        fill(later, 'b', PAGE - 1, 2);
        fill(later, 'b', 300 * 1024, 1);
        fill(later, 'b', 2 * MIB + 5 * PAGE, 1);
        fill(base, 'b', 2 * MIB + 9 * PAGE, 1);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 4);
        check_extent(&found, 0, 0, 2 * PAGE);
        check_extent(&found, 1, 300 * 1024, PAGE);
        check_extent(&found, 2, 2 * MIB + 5 * PAGE, PAGE);
        check_extent(&found, 3, 2 * MIB + 9 * PAGE, PAGE);
        CHECK_EQUAL(compare(base, later, 2 * MIB, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        check_extent(&found, 0, 0, 3 * MIB);
        CHECK_ALLOCATIONS(compare(base, later, PAGE, &found));
        close(base);
        close(later);
}

static void test_zeros_are_holes(void)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        int base = file_of(64 * MIB);
        int later = file_of(64 * MIB);

        fill(base, 0, 10 * MIB, MIB);
        fill(later, 0, 20 * MIB, MIB);
        CHECK_EQUAL(compare(base, later, 64 * 1024, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        CHECK_EQUAL(found.base_bytes, MIB);
        CHECK_EQUAL(found.later_bytes, MIB);
        fill(base, 1, 11 * MIB - 1, 1);
        CHECK_EQUAL(compare(base, later, 64 * 1024, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        check_extent(&found, 0, 11 * MIB - 64 * 1024, 64 * 1024);
        close(base);
        close(later);
}

static void test_different_sizes(void)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        int base = file_of(0);
        int later = file_of(0);

        fill(base, 'a', 0, 10 * PAGE + 100);
        fill(later, 'a', 0, 20 * PAGE + 200);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        check_extent(&found, 0, 10 * PAGE, 10 * PAGE + 200);
        CHECK_EQUAL(compare(later, base, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        /* What the longer one has beyond the shorter one's end is zeros: nothing has to be written. */
        fill(later, 0, 10 * PAGE + 100, 10 * PAGE + 100);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        CHECK_EQUAL(ftruncate(base, 0), 0);
        CHECK_EQUAL(compare(later, base, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 1);
        check_extent(&found, 0, 0, 11 * PAGE);
        close(base);
        close(later);
}

/* The buffer of the shorter one still has what was read before. */
static void test_zeros_beyond_the_end_of_the_base(void)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        int base = file_of(0);
        int later = file_of(0);

        fill(base, 'a', 0, MIB + PAGE);
        fill(later, 'a', 0, MIB + PAGE);
        fill(later, 0, MIB + PAGE, MIB);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        CHECK_EQUAL(found.changed.count, 0);
        fill(later, 'a', MIB + PAGE, MIB);
        CHECK_EQUAL(compare(base, later, PAGE, &found), 0);
        check_extent(&found, 0, MIB + PAGE, MIB);
        close(base);
        close(later);
}

static int truncate_it(void *context)
{
        CHECK_EQUAL(ftruncate(*(int *)context, MIB + 5 * PAGE + 100), 0);
        return 0;
}

static int refuse(void *context)
{
        ++*(int *)context;
        return -1;
}

static void test_errors_and_interrupts(void)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        int base = file_of(0);
        int later = file_of(0);
        int asked = 0;
        struct bs_compare request = {.base_fd = base, .later_fd = later, .block_size = PAGE};
        struct bs_interrupt stop = {.check = refuse, .context = &asked};
        struct bs_error error = {.call = NULL};

        fill(base, 'a', 0, 3 * MIB);
        fill(later, 'a', 0, 3 * MIB);
        CHECK_EQUAL(bs_compare(&request, &stop, &error, &found), -EINTR);
        CHECK_EQUAL(asked, 1);

        static const uint64_t sizes[] = {0, 1, 512, PAGE + 1, 2 * (uint64_t)BS_COMPARE_MAX_BLOCK, UINT64_MAX};

        for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
                CHECK_EQUAL(compare(base, later, sizes[i], &found), -ERANGE);
        CHECK_EQUAL(compare(base, later, BS_COMPARE_MAX_BLOCK, &found), 0);
        CHECK_EQUAL(compare(-1, later, PAGE, &found), -EBADF);
        CHECK(found.failed_in_base);
        CHECK_EQUAL(compare(base, -1, PAGE, &found), -EBADF);
        CHECK(!found.failed_in_base);

        int directory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        CHECK_EQUAL(compare(base, directory, PAGE, &found), -ENOTBLK);
        close(directory);

        /* It ends in the middle of the comparison: the page in which it now ends is named. */
        struct bs_interrupt cut = {.check = truncate_it, .context = &later};

        CHECK_EQUAL(bs_compare(&request, &cut, &error, &found), -ENODATA);
        CHECK(!found.failed_in_base);
        CHECK_EQUAL(error.block, MIB + 5 * PAGE);
        close(base);
        close(later);
}

int main(void)
{
        test_blocks_that_differ();
        test_zeros_are_holes();
        test_different_sizes();
        test_zeros_beyond_the_end_of_the_base();
        test_errors_and_interrupts();
        return 0;
}
