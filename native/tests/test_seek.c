/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "seek.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

static const struct bs_interrupt never = {.check = NULL};

static int refuse(void *context)
{
        ++*(int *)context;
        return -1;
}

/* A file of 100 pages, which has data in pages 10, 11, 50 and 99. */
static int sparse_file(void)
{
        static const off_t pages[] = {10, 11, 50, 99};
        int fd = memfd_create("sparse", MFD_CLOEXEC);

        CHECK(fd >= 0);
        CHECK_EQUAL(ftruncate(fd, 100 * PAGE), 0);
        for (size_t i = 0; i < sizeof(pages) / sizeof(*pages); i++)
                CHECK_EQUAL(pwrite(fd, "x", 1, pages[i] * PAGE), 1);
        return fd;
}

static int scan(int fd, uint64_t offset, uint64_t length, struct bs_extents *out)
{
        struct bs_error error = {.call = NULL};

        bs_extents_deinit(out);
        return bs_data_extents(fd, offset, length, &never, &error, out);
}

static void test_sparse_file(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents found = {.count = 0};
        int fd = sparse_file();

        CHECK_EQUAL(scan(fd, 0, 200 * PAGE, &found), 0);
        CHECK_EQUAL(found.count, 3);
        CHECK_EQUAL(found.items[0].offset, 10 * PAGE);
        CHECK_EQUAL(found.items[0].length, 2 * PAGE);
        CHECK_EQUAL(found.items[1].offset, 50 * PAGE);
        CHECK_EQUAL(found.items[2].offset, 99 * PAGE);
        CHECK_EQUAL(found.items[2].length, PAGE);
        CHECK_EQUAL(scan(fd, 11 * PAGE + 1, 39 * PAGE, &found), 0);
        CHECK_EQUAL(found.count, 2);
        CHECK_EQUAL(found.items[0].offset, 11 * PAGE + 1);
        CHECK_EQUAL(found.items[0].length, PAGE - 1);
        CHECK_EQUAL(found.items[1].length, 1);
        CHECK_EQUAL(scan(fd, 0, 0, &found), 0);
        CHECK_EQUAL(found.count, 0);
        CHECK_EQUAL(scan(fd, 100 * PAGE, PAGE, &found), 0);
        CHECK_EQUAL(found.count, 0);
        CHECK_ALLOCATIONS(scan(fd, 0, 200 * PAGE, &found));
        close(fd);
}

static void test_errors_and_interrupts(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents found = {.count = 0};
        struct bs_error error = {.call = NULL};
        int asked = 0;
        struct bs_interrupt stop = {.check = refuse, .context = &asked};
        int fd = sparse_file();

        CHECK_EQUAL(bs_data_extents(fd, 0, 100 * PAGE, &stop, &error, &found), -EINTR);
        CHECK_EQUAL(asked, 1);
        CHECK_EQUAL(scan(fd, UINT64_MAX, 2, &found), -EOVERFLOW);
        CHECK_EQUAL(scan(fd, INT64_MAX, 1, &found), -EOVERFLOW);
        close(fd);
        CHECK_EQUAL(bs_data_extents(fd, 0, PAGE, &never, &error, &found), -EBADF);
        CHECK(strcmp(error.call, "lseek") == 0);
}

static void test_what_cannot_tell_is_all_data(void)
{
        _cleanup_(bs_extents_deinit) struct bs_extents found = {.count = 0};
        int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);

        CHECK(fd >= 0);
        CHECK_EQUAL(scan(fd, 5, 1000, &found), 0);
        CHECK_EQUAL(found.count, 1);
        CHECK_EQUAL(found.items[0].offset, 5);
        CHECK_EQUAL(found.items[0].length, 1000);
        close(fd);
}

int main(void)
{
        test_sparse_file();
        test_errors_and_interrupts();
        test_what_cannot_tell_is_all_data();
        return 0;
}
