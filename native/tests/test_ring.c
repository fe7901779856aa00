/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "ring.h"

#include <sys/mman.h>
#include <unistd.h>

/* More than the ring has room for. */
enum { BLOCKS = 300, BLOCK = 512 };

/* A file in whose block n every byte is n % 251, and that ends in the middle of a block. */
static int file_of_blocks(void)
{
        int fd = memfd_create("test", MFD_CLOEXEC);
        uint8_t block[BLOCK];

        CHECK(fd >= 0);
        for (int n = 0; n < BLOCKS; n++) {
                memset(block, n % 251, sizeof(block));
                CHECK_EQUAL(write(fd, block, sizeof(block)), BLOCK);
        }
        CHECK_EQUAL(write(fd, block, BLOCK / 2), BLOCK / 2);
        return fd;
}

/* Reads of blocks `from` and on, into buffers one behind another. */
static void plan(struct bs_read *reads, size_t count, size_t from, uint8_t *buffer)
{
        memset(buffer, 0xff, count * BLOCK);
        for (size_t i = 0; i < count; i++)
                reads[i] = (struct bs_read){
                        .offset = (from + i) * BLOCK,
                        .buffer = buffer + i * BLOCK,
                        .length = BLOCK,
                };
}

static void check_read(const struct bs_read *read)
{
        const uint8_t *bytes = read->buffer;

        CHECK_EQUAL(read->result, 0);
        CHECK_EQUAL(bytes[0], read->offset / BLOCK % 251);
        CHECK_EQUAL(bytes[BLOCK - 1], read->offset / BLOCK % 251);
}

static void read_all(struct bs_ring *ring, const struct bs_reader *reader)
{
        static uint8_t buffer[BLOCKS * BLOCK];
        static struct bs_read reads[BLOCKS];

        /* Finished in the order of a hash: nobody may rely on that in which they were begun. */
        plan(reads, BLOCKS, 0, buffer);
        bs_read_start(reader, reads, BLOCKS);
        for (size_t i = 0; i < BLOCKS; i++) {
                struct bs_read *read = &reads[i * 7 % BLOCKS];

                bs_read_finish(reader, read);
                check_read(read);
        }
        CHECK_EQUAL(ring->under_way, 0);
        /* More are begun while others are under way. */
        plan(reads, BLOCKS, 0, buffer);
        for (size_t i = 0; i < BLOCKS; i += 20)
                bs_read_start(reader, reads + i, 20);
        for (size_t i = 0; i < BLOCKS; i++) {
                bs_read_finish(reader, &reads[i]);
                check_read(&reads[i]);
        }
        CHECK_EQUAL(ring->under_way, 0);
}

static void test_many_reads(void)
{
        struct bs_error error;
        struct bs_ring ring;
        struct bs_reader reader;
        int fd = file_of_blocks();

        CHECK_EQUAL(bs_ring_reader_init(&ring, fd, &error, &reader), 0);
        CHECK_EQUAL(reader.size, BLOCKS * BLOCK + BLOCK / 2);
        read_all(&ring, &reader);
        bs_ring_deinit(&ring);
        /* The same where there is no io_uring. */
        CHECK_EQUAL(bs_ring_reader_init(&ring, fd, &error, &reader), 0);
        ring.disabled = true;
        read_all(&ring, &reader);
        CHECK_EQUAL(ring.ring, -1);
        bs_ring_deinit(&ring);
        close(fd);
}

static void test_each_read_has_its_own_result(void)
{
        uint8_t buffer[4 * BLOCK];
        struct bs_read reads[4];
        struct bs_error error;
        struct bs_ring ring;
        struct bs_reader reader;
        int fd = file_of_blocks();

        CHECK_EQUAL(bs_ring_reader_init(&ring, fd, &error, &reader), 0);
        plan(reads, 4, BLOCKS - 2, buffer);
        bs_read_many(&reader, reads, 4);
        check_read(&reads[0]);
        check_read(&reads[1]);
        /* Half of it is there, and nothing. */
        CHECK_EQUAL(reads[2].result, -ENODATA);
        CHECK_EQUAL(reads[3].result, -ENODATA);
        plan(reads, 4, 0, buffer);
        close(fd);
        bs_read_many(&reader, reads, 4);
        for (size_t i = 0; i < 4; i++)
                CHECK_EQUAL(reads[i].result, -EBADF);
        bs_ring_deinit(&ring);
        CHECK_EQUAL(bs_ring_reader_init(&ring, fd, &error, &reader), -EBADF);
        bs_ring_deinit(&ring);
}

static void test_nothing_to_read(void)
{
        struct bs_error error;
        struct bs_ring ring;
        struct bs_reader reader;
        int fd = file_of_blocks();

        CHECK_EQUAL(bs_ring_reader_init(&ring, fd, &error, &reader), 0);
        bs_read_many(&reader, NULL, 0);
        CHECK_EQUAL(ring.ring, -1);
        bs_ring_deinit(&ring);
        close(fd);
}

int main(void)
{
        test_many_reads();
        test_each_read_has_its_own_result();
        test_nothing_to_read();
        return 0;
}
