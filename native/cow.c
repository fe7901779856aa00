/* SPDX-License-Identifier: Apache-2.0 */
#include "cow.h"

#include "cleanup.h"
#include "extent.h"
#include "little_endian.h"
#include "memory.h"
#include "record_sort.h"

#include <endian.h>
#include <stdbool.h>
#include <time.h>

enum {
        MAGIC = 0x70416e53, /* "SnAp" */
        VERSION = 1,
        SECTOR_SIZE = 512,

        /* So many bytes and requests at a time, of areas that are read together. */
        BATCH_BYTES = 1 << 20,
#ifdef BS_TEST_BATCH_RUNS
        BATCH_READS = BS_TEST_BATCH_RUNS,
#else
        BATCH_READS = 128,
#endif

        /* About what the kernel takes to write an area. */
        TORN_WAIT_NANOSECONDS = 1000000,
};

_Static_assert((int)BATCH_BYTES >= (int)BS_COW_MAX_CHUNK_SIZE, "an area has to fit the buffer");

struct header {
        uint32_t magic;
        uint32_t valid;
        uint32_t version;
        uint32_t chunk_sectors;
};

struct walk {
        const struct bs_reader *reader;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        struct bs_cow_result *result;
        uint64_t origin_chunks; /* an entry is for one of these */
        uint64_t store_chunks;  /* of the -cow device, without a partial last one */
        uint64_t stride;        /* chunks from one area to the next */
        uint64_t next_area;     /* all before it are full */
        uint64_t settled_areas;
        unsigned attempts;
        uint8_t *block;  /* for the header */
        uint8_t *buffer; /* for areas: BATCH_BYTES where many are read together, or one */
};

static uint64_t old_chunk(const uint8_t *area, uint64_t index)
{
        return bs_le64(area + index * BS_COW_ENTRY_SIZE);
}

static uint64_t new_chunk(const uint8_t *area, uint64_t index)
{
        return bs_le64(area + index * BS_COW_ENTRY_SIZE + 8);
}

static const char *header_fault(const struct header *header)
{
        uint64_t chunk_size = (uint64_t)header->chunk_sectors * SECTOR_SIZE;

        if (header->magic == 0)
                return "the device was never initialised as an exception store";
        if (header->magic != MAGIC)
                return "the device is not the exception store of a snapshot";
        if (header->version != VERSION)
                return "the exception store has an unknown version";
        if (header->valid == 0)
                return "the kernel has invalidated the snapshot, so its list is not complete";
        if (header->valid != 1)
                return "the header is neither valid nor invalid";
        if (chunk_size < BS_COW_MIN_CHUNK_SIZE || chunk_size > BS_COW_MAX_CHUNK_SIZE ||
            (chunk_size & (chunk_size - 1)) != 0)
                return "the exception store has a chunk size that LVM does not make";
        return NULL;
}

static int read_header(struct walk *walk, struct header *out)
{
        uint32_t words[4];
        const char *fault;

        if (walk->reader->size < BS_IO_ALIGNMENT)
                return bs_fail_block(walk->error, 0, "the device is too small for an exception store");

        int result = walk->reader->read(walk->reader->context, 0, walk->block, BS_IO_ALIGNMENT);

        if (result < 0)
                return bs_fail_call(walk->error, walk->reader->call, result);
        memcpy(words, walk->block, sizeof(words));
        *out = (struct header){
                .magic = le32toh(words[0]),
                .valid = le32toh(words[1]),
                .version = le32toh(words[2]),
                .chunk_sectors = le32toh(words[3]),
        };
        fault = header_fault(out);
        return fault ? bs_fail_block(walk->error, 0, fault) : 0;
}

static int prepare(struct walk *walk, const struct bs_cow_scan *scan, const struct header *header)
{
        uint64_t chunk_size = (uint64_t)header->chunk_sectors * SECTOR_SIZE;

        if (scan->origin_size > INT64_MAX)
                return bs_fail_range(walk->error, "the origin is larger than 2^63 bytes");
        walk->result->chunk_size = chunk_size;
        walk->result->origin_size = scan->origin_size ? scan->origin_size : INT64_MAX;
        walk->origin_chunks =
                walk->result->origin_size / chunk_size + (walk->result->origin_size % chunk_size != 0);
        walk->store_chunks = walk->reader->size / chunk_size;
        walk->stride = chunk_size / BS_COW_ENTRY_SIZE + 1;
        walk->settled_areas = scan->settled_areas;
        walk->attempts = scan->attempts;
        return 0;
}

/* The chunk of the store in which an area is; it has to be on the device. */
static int locate(const struct walk *walk, uint64_t area, uint64_t *out)
{
        /* The first area is in chunk 1. */
        if (walk->store_chunks < 2 || area > (walk->store_chunks - 2) / walk->stride)
                return bs_fail_block(walk->error, walk->store_chunks,
                                     "the device ends before the list of exceptions does");
        *out = 1 + area * walk->stride;
        return 0;
}

static int add(struct bs_cow_result *result, uint64_t chunk)
{
        if (result->count == result->capacity) {
                size_t capacity = result->capacity ? result->capacity * 2 : 1024;
                uint64_t *chunks = bs_realloc(result->chunks, capacity, sizeof(*chunks));

                if (!chunks)
                        return -ENOMEM;
                result->chunks = chunks;
                result->capacity = capacity;
        }
        result->chunks[result->count++] = chunk;
        return 0;
}

static const char *entry_fault(const struct walk *walk, uint64_t from, uint64_t to)
{
        if (to >= walk->store_chunks)
                return "an entry points beyond the end of the device";
        if (to % walk->stride == 1)
                return "an entry points at the list itself";
        if (from >= walk->origin_chunks)
                return "an entry is for a chunk beyond the end of the origin";
        return NULL;
}

/* How many entries an area has before the first one of zeros; -EUCLEAN when something follows that one. */
static int count_entries(const struct walk *walk, uint64_t chunk, const uint8_t *area, uint64_t *out)
{
        uint64_t room = walk->stride - 1;
        uint64_t count = 0;

        while (count < room && new_chunk(area, count) != 0)
                count++;
        for (uint64_t i = count; i < room; i++)
                if (old_chunk(area, i) != 0 || new_chunk(area, i) != 0)
                        return bs_fail_block(
                                walk->error, chunk,
                                "an area of the list was written in part: entries follow its end");
        *out = count;
        return 0;
}

static int take_entries(struct walk *walk, uint64_t chunk, const uint8_t *area, uint64_t count)
{
        struct bs_cow_result *result = walk->result;

        for (uint64_t i = 0; i < count; i++) {
                uint64_t from = old_chunk(area, i);
                uint64_t to = new_chunk(area, i);
                const char *fault = entry_fault(walk, from, to);

                if (fault)
                        return bs_fail_block(walk->error, chunk, fault);
                if (to >= result->allocated)
                        result->allocated = to + 1;

                int added = add(result, from);

                if (added < 0)
                        return added;
        }
        return 0;
}

/* Plan the next reads of areas that are known to be full. */
static int plan_reads(struct walk *walk, struct bs_read *reads, size_t *out)
{
        uint64_t chunk_size = walk->result->chunk_size;
        uint64_t wanted = walk->settled_areas - walk->next_area;
        uint64_t most = BATCH_BYTES / chunk_size < BATCH_READS ? BATCH_BYTES / chunk_size : BATCH_READS;
        size_t count = 0;

        while (count < wanted && count < most) {
                uint64_t chunk;
                int result = locate(walk, walk->next_area + count, &chunk);

                if (result < 0)
                        return result;
                reads[count] = (struct bs_read){
                        .offset = chunk * chunk_size,
                        .buffer = walk->buffer + count * chunk_size,
                        .length = (size_t)chunk_size,
                };
                count++;
        }
        *out = count;
        return 0;
}

static int take_settled(struct walk *walk, const struct bs_read *read)
{
        uint64_t chunk = read->offset / walk->result->chunk_size;
        uint64_t entries;

        if (read->result < 0)
                return bs_fail_call(walk->error, walk->reader->call, read->result);

        int result = count_entries(walk, chunk, read->buffer, &entries);

        if (result == 0 && entries < walk->stride - 1)
                return bs_fail_block(walk->error, chunk, "the list is shorter than the kernel has said");
        return result < 0 ? result : take_entries(walk, chunk, read->buffer, entries);
}

/* Full areas do not change any more, so they are read many at a time. */
static int read_settled(struct walk *walk)
{
        int result = 0;

        while (result == 0 && walk->next_area < walk->settled_areas) {
                struct bs_read reads[BATCH_READS];
                size_t count;

                result = plan_reads(walk, reads, &count);
                if (result < 0)
                        return result;
                bs_read_many(walk->reader, reads, count);
                for (size_t i = 0; i < count && result == 0; i++)
                        result = take_settled(walk, &reads[i]);
                walk->next_area += count;
                if (result == 0)
                        result = bs_interrupted(walk->interrupt);
        }
        return result;
}

/* Read an area that may be written meanwhile, and again while it is caught in mid-write. */
static int read_area(struct walk *walk, uint64_t chunk, uint64_t *entries)
{
        const struct timespec wait = {.tv_nsec = TORN_WAIT_NANOSECONDS};
        size_t chunk_size = (size_t)walk->result->chunk_size;
        unsigned attempt = 0;
        int torn;

        do {
                if (attempt > 0)
                        nanosleep(&wait, NULL);

                int result = walk->reader->read(walk->reader->context, chunk * chunk_size, walk->buffer,
                                                chunk_size);

                if (result < 0)
                        return bs_fail_call(walk->error, walk->reader->call, result);
                result = bs_interrupted(walk->interrupt);
                if (result < 0)
                        return result;
                torn = count_entries(walk, chunk, walk->buffer, entries);
        } while (torn < 0 && ++attempt < walk->attempts);
        return torn;
}

/* The areas from the first one on that may not be full, one after the other, up to the end of the list. */
static int read_rest(struct walk *walk)
{
        uint64_t entries = walk->stride - 1;

        while (entries == walk->stride - 1) {
                uint64_t chunk;
                int result = locate(walk, walk->next_area, &chunk);

                if (result == 0)
                        result = read_area(walk, chunk, &entries);
                if (result == 0)
                        result = take_entries(walk, chunk, walk->buffer, entries);
                if (result < 0)
                        return result;
                walk->next_area++;
        }
        return 0;
}

static int sort_chunks(struct walk *walk)
{
        struct bs_cow_result *result = walk->result;

        bs_sort_records(result->chunks, result->count, sizeof(*result->chunks), 0);
        for (size_t i = 1; i < result->count; i++)
                if (result->chunks[i] == result->chunks[i - 1])
                        return bs_fail_block(walk->error, result->chunks[i],
                                             "the list has this chunk of the origin twice");
        return 0;
}

/* A store that was invalidated or made anew while it was read is not to be trusted. */
static int check_header(struct walk *walk, const struct header *before)
{
        struct header now;
        int result = read_header(walk, &now);

        if (result == 0 && now.chunk_sectors != before->chunk_sectors)
                return bs_fail_block(walk->error, 0, "the exception store was replaced while it was read");
        return result;
}

void bs_cow_result_deinit(struct bs_cow_result *result)
{
        bs_free(result->chunks);
        *result = (struct bs_cow_result){.chunks = NULL};
}

static int read_list(struct walk *walk)
{
        size_t one = (size_t)walk->result->chunk_size;
        _cleanup_free_ uint8_t *buffer = bs_alloc_aligned(walk->settled_areas > 1 ? BATCH_BYTES : one);

        if (!buffer)
                return -ENOMEM;
        walk->buffer = buffer;

        int result = read_settled(walk);

        return result < 0 ? result : read_rest(walk);
}

int bs_cow_scan(const struct bs_reader *reader, const struct bs_cow_scan *scan,
                const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_cow_result *out)
{
        _cleanup_free_ uint8_t *block = bs_alloc_aligned(BS_IO_ALIGNMENT);
        struct walk walk = {
                .reader = reader,
                .interrupt = interrupt,
                .error = error,
                .result = out,
                .block = block,
        };
        struct header header;

        /* The kernel never gives away chunk 0, the header, and chunk 1, the first area. */
        *out = (struct bs_cow_result){.allocated = 2};
        if (!block)
                return -ENOMEM;

        int result = read_header(&walk, &header);

        if (result == 0)
                result = prepare(&walk, scan, &header);
        if (result == 0)
                result = read_list(&walk);
        if (result == 0)
                result = check_header(&walk, &header);
        if (result == 0)
                result = sort_chunks(&walk);
        out->areas = walk.next_area;
        if (result == 0 && out->allocated % walk.stride == 1)
                out->allocated++;
        return result;
}

size_t bs_cow_extent_count(const struct bs_cow_result *result)
{
        size_t count = 0;

        for (size_t i = 0; i < result->count; i++)
                count += i == 0 || result->chunks[i] != result->chunks[i - 1] + 1;
        return count;
}

void bs_cow_extents_pack(const struct bs_cow_result *result, uint8_t *out)
{
        for (size_t i = 0; i < result->count;) {
                uint64_t begin = result->chunks[i] * result->chunk_size;
                size_t first = i++;

                while (i < result->count && result->chunks[i] == result->chunks[i - 1] + 1)
                        i++;

                uint64_t length = (uint64_t)(i - first) * result->chunk_size;

                if (length > result->origin_size - begin)
                        length = result->origin_size - begin;
                bs_extent_pack(begin, length, out);
                out += BS_PACKED_EXTENT_SIZE;
        }
}
