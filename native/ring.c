/* SPDX-License-Identifier: Apache-2.0 */
#include "ring.h"

#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
        /* Requests under way at a time; more of them do not make a solid-state disk faster. */
        RING_SIZE = 128,
        WAIT_NANOSECONDS = 1000000,
};

static int enter(const struct bs_ring *ring, unsigned submit, unsigned wait)
{
        unsigned flags = wait ? IORING_ENTER_GETEVENTS : 0;

        return (int)syscall(__NR_io_uring_enter, ring->ring, submit, wait, flags, NULL, 0);
}

static void *map(const struct bs_ring *ring, size_t size, off_t what)
{
        void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->ring, what);

        return mapped == MAP_FAILED ? NULL : mapped;
}

static void *inside(const struct bs_ring *ring, uint32_t offset)
{
        return (uint8_t *)ring->rings + offset;
}

static bool map_rings(struct bs_ring *ring, const struct io_uring_params *parameters)
{
        const struct io_sqring_offsets *submission = &parameters->sq_off;
        const struct io_cqring_offsets *completion = &parameters->cq_off;
        size_t submission_size = submission->array + parameters->sq_entries * sizeof(uint32_t);

        ring->rings_size = completion->cqes + parameters->cq_entries * sizeof(struct io_uring_cqe);
        if (ring->rings_size < submission_size)
                ring->rings_size = submission_size;
        ring->entries_size = parameters->sq_entries * sizeof(struct io_uring_sqe);
        ring->rings = map(ring, ring->rings_size, IORING_OFF_SQ_RING);
        ring->entries = map(ring, ring->entries_size, IORING_OFF_SQES);
        if (!ring->rings || !ring->entries)
                return false;
        ring->submission_tail = inside(ring, submission->tail);
        ring->submission_mask = *(uint32_t *)inside(ring, submission->ring_mask);
        ring->completion_head = inside(ring, completion->head);
        ring->completion_tail = inside(ring, completion->tail);
        ring->completion_mask = *(uint32_t *)inside(ring, completion->ring_mask);
        ring->completions = inside(ring, completion->cqes);

        uint32_t *array = inside(ring, submission->array);

        /* Entry n always stands at place n. */
        for (uint32_t i = 0; i < parameters->sq_entries; i++)
                array[i] = i;
        return true;
}

static bool set_up(struct bs_ring *ring)
{
        struct io_uring_params parameters = {.sq_entries = 0};

        if (ring->ring >= 0 || ring->disabled)
                return !ring->disabled;
        ring->ring = (int)syscall(__NR_io_uring_setup, RING_SIZE, &parameters);
        /* Before 5.4 the two rings are mapped one by one; such kernels cannot read this way either. */
        ring->disabled = ring->ring < 0 || !(parameters.features & IORING_FEAT_SINGLE_MMAP) ||
                         !map_rings(ring, &parameters);
        return !ring->disabled;
}

static void start(void *context, struct bs_read *reads, size_t count)
{
        struct bs_ring *ring = context;
        struct io_uring_sqe *entries;
        uint32_t tail;
        int submitted;

        /* A single read is over sooner without the detour. */
        if (count + ring->under_way < 2 || !set_up(ring))
                return;
        entries = ring->entries;
        tail = *ring->submission_tail;
        if (count > RING_SIZE - ring->under_way)
                count = RING_SIZE - ring->under_way;
        for (uint32_t i = 0; i < count; i++) {
                entries[(tail + i) & ring->submission_mask] = (struct io_uring_sqe){
                        .opcode = IORING_OP_READ,
                        .fd = ring->file,
                        .off = reads[i].offset,
                        .addr = (uintptr_t)reads[i].buffer,
                        .len = (uint32_t)reads[i].length,
                        .user_data = (uintptr_t)&reads[i],
                };
                reads[i].result = BS_READ_STARTED;
        }
        __atomic_store_n(ring->submission_tail, tail + (uint32_t)count, __ATOMIC_RELEASE);
        submitted = enter(ring, (unsigned)count, 0);
        if (submitted < 0)
                submitted = 0;
        ring->under_way += (size_t)submitted;
        /* The kernel takes entries in order; those it did not take are taken back. */
        __atomic_store_n(ring->submission_tail, tail + (uint32_t)submitted, __ATOMIC_RELEASE);
        for (size_t i = (size_t)submitted; i < count; i++)
                reads[i].result = BS_READ_TO_BE_MADE;
}

/* Take what is completed; whatever did not come through whole is made again, which also tells why. */
static void reap(struct bs_ring *ring)
{
        const struct io_uring_cqe *completions = ring->completions;
        uint32_t head = *ring->completion_head;
        uint32_t tail = __atomic_load_n(ring->completion_tail, __ATOMIC_ACQUIRE);

        ring->under_way -= tail - head;
        for (; head != tail; head++) {
                const struct io_uring_cqe *completion = &completions[head & ring->completion_mask];
                struct bs_read *read = (struct bs_read *)(uintptr_t)completion->user_data;
                bool whole = completion->res >= 0 && (size_t)completion->res == read->length;

                read->result = whole ? 0 : BS_READ_TO_BE_MADE;
        }
        __atomic_store_n(ring->completion_head, head, __ATOMIC_RELEASE);
}

static void finish(void *context, struct bs_read *read)
{
        const struct timespec wait = {.tv_nsec = WAIT_NANOSECONDS};
        struct bs_ring *ring = context;

        reap(ring);
        while (read->result == BS_READ_STARTED) {
                /* The kernel writes to the buffer until the read is over: there is no giving up. */
                if (enter(ring, 0, 1) < 0)
                        nanosleep(&wait, NULL);
                reap(ring);
        }
}

static int read_now(void *context, uint64_t offset, void *buffer, size_t length)
{
        const struct bs_ring *ring = context;

        return bs_pread_all(ring->file, buffer, length, offset);
}

int bs_ring_reader_init(struct bs_ring *ring, int file, struct bs_error *error, struct bs_reader *out)
{
        *ring = (struct bs_ring){.file = file, .ring = -1};
        *out = (struct bs_reader){
                .read = read_now,
                .start = start,
                .finish = finish,
                .context = ring,
                .call = "pread",
        };
        return bs_fd_size(file, error, &out->size);
}

void bs_ring_deinit(struct bs_ring *ring)
{
        if (ring->rings)
                munmap(ring->rings, ring->rings_size);
        if (ring->entries)
                munmap(ring->entries, ring->entries_size);
        if (ring->ring >= 0)
                close(ring->ring);
        *ring = (struct bs_ring){.file = -1, .ring = -1};
}
