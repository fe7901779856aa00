/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static int file_of(size_t size)
{
        int fd = memfd_create("test", MFD_CLOEXEC);

        CHECK(fd >= 0);
        for (size_t i = 0; i < size; i++) {
                uint8_t byte = (uint8_t)i;

                CHECK_EQUAL(write(fd, &byte, 1), 1);
        }
        return fd;
}

static void test_pread_all(void)
{
        int fd = file_of(1000);
        uint8_t buffer[100];

        CHECK_EQUAL(bs_pread_all(fd, buffer, sizeof(buffer), 900), 0);
        CHECK_EQUAL(buffer[0], 900 % 256);
        CHECK_EQUAL(buffer[99], 999 % 256);
        CHECK_EQUAL(bs_pread_all(fd, buffer, sizeof(buffer), 901), -ENODATA);
        CHECK_EQUAL(bs_pread_all(fd, buffer, 0, 5000), 0);
        CHECK_EQUAL(bs_pread_all(fd, buffer, 1, INT64_MAX), -EOVERFLOW);
        CHECK_EQUAL(bs_pread_all(fd, buffer, 2, UINT64_MAX), -EOVERFLOW);
        close(fd);
        CHECK_EQUAL(bs_pread_all(fd, buffer, 1, 0), -EBADF);
}

static void test_size_of_descriptors(void)
{
        struct bs_error error = {.call = NULL};
        uint64_t size;
        int fd = file_of(777);
        int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

        CHECK_EQUAL(bs_fd_size(fd, &error, &size), 0);
        CHECK_EQUAL(size, 777);
        CHECK_EQUAL(bs_fd_size(null, &error, &size), -ENOTBLK);
        close(fd);
        close(null);
        CHECK_EQUAL(bs_fd_size(fd, &error, &size), -EBADF);
        CHECK(strcmp(error.call, "fstat") == 0);
}

static void test_fd_reader(void)
{
        struct bs_error error = {.call = NULL};
        struct bs_reader reader;
        int fd = file_of(5000);
        _cleanup_free_ uint8_t *buffer = bs_alloc_aligned(BS_IO_ALIGNMENT);

        CHECK(buffer && (uintptr_t)buffer % BS_IO_ALIGNMENT == 0);
        CHECK_EQUAL(bs_fd_reader_init(&fd, &error, &reader), 0);
        CHECK_EQUAL(reader.size, 5000);
        CHECK_EQUAL(reader.read(reader.context, 0, buffer, BS_IO_ALIGNMENT), 0);
        CHECK_EQUAL(buffer[300], 300 % 256);
        CHECK_EQUAL(reader.read(reader.context, 4096, buffer, BS_IO_ALIGNMENT), -ENODATA);
        close(fd);
}

static void test_allocation_sizes(void)
{
        CHECK(!bs_realloc(NULL, SIZE_MAX / 2, 4));
        CHECK(!bs_realloc(NULL, 0, 4));
}

int main(void)
{
        test_pread_all();
        test_size_of_descriptors();
        test_fd_reader();
        test_allocation_sizes();
        return 0;
}
