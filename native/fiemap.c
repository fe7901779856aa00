/* SPDX-License-Identifier: Apache-2.0 */
#include "fiemap.h"

#include "cleanup.h"

#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>

enum {
        SECTOR = 512,
        /* Flags that change nothing about where the bytes are and what they are. */
        HARMLESS = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED,
};

/* Bytes [begin, end) of a file, which lie at `physical` on the device. */
struct piece {
        uint64_t begin;
        uint64_t end;
        uint64_t physical;
};

/* A walk along the data of one map. */
struct cursor {
        const struct bs_fiemap_source *source;
        const struct bs_interrupt *interrupt;
        struct bs_error *error;
        struct fiemap *answer;
        uint64_t position;  /* the answer tells about all before */
        uint64_t limit;     /* nothing is wanted from here on */
        uint64_t records;   /* seen so far */
        uint32_t next;      /* record of the answer to look at */
        bool asked;         /* once at least */
        struct piece piece; /* the current one; at the end both its bounds are UINT64_MAX */
};

static int cursor_init(struct cursor *cursor, const struct bs_fiemap *map, uint64_t limit,
                       const struct bs_interrupt *interrupt, struct bs_error *error)
{
        *cursor = (struct cursor){
                .source = &map->source,
                .interrupt = interrupt,
                .error = error,
                .limit = limit < map->size ? limit : map->size,
                .answer = bs_alloc_zeroed(sizeof(struct fiemap) +
                                          BS_FIEMAP_RECORDS * sizeof(struct fiemap_extent)),
        };
        return cursor->answer ? 0 : -ENOMEM;
}

static void cursor_deinit(struct cursor *cursor)
{
        bs_free(cursor->answer);
}

static const char *what_is_wrong(const struct fiemap_extent *record, uint64_t position, uint64_t limit)
{
        uint64_t end;

        if (record->fe_flags & ~(uint32_t)(HARMLESS | FIEMAP_EXTENT_UNWRITTEN))
                return "an extent that is delayed, inline, compressed or otherwise not just a place on the "
                       "device";
        if ((record->fe_logical | record->fe_physical | record->fe_length) % SECTOR)
                return "an extent that is not made of sectors";
        if (record->fe_length == 0)
                return "an empty extent";
        if (record->fe_logical < position)
                return "an extent that begins before the end of the one before";
        if (record->fe_logical >= limit)
                return "an extent beyond the range that was asked for";
        if (__builtin_add_overflow(record->fe_logical, record->fe_length, &end) ||
            __builtin_add_overflow(record->fe_physical, record->fe_length, &end))
                return "an extent that ends beyond 2^64 bytes";
        return NULL;
}

static int check_answer(struct cursor *cursor)
{
        const struct fiemap *answer = cursor->answer;

        if (answer->fm_mapped_extents > BS_FIEMAP_RECORDS)
                return bs_fail_block(cursor->error, cursor->position, "more extents than were asked for");
        /* Every extent moves the position on, so the walk comes to an end whatever the answers are. */
        for (uint32_t i = 0; i < answer->fm_mapped_extents; i++) {
                const struct fiemap_extent *record = &answer->fm_extents[i];
                const char *reason = what_is_wrong(record, cursor->position, cursor->limit);

                if (reason)
                        return bs_fail_block(cursor->error, record->fe_logical, reason);
                cursor->position = record->fe_logical + record->fe_length;
        }
        cursor->records += answer->fm_mapped_extents;
        return 0;
}

static int ask(struct cursor *cursor)
{
        struct fiemap *answer = cursor->answer;

        *answer = (struct fiemap){
                .fm_start = cursor->position,
                .fm_length = cursor->limit - cursor->position,
                /* Once is enough: nobody writes to the file. */
                .fm_flags = cursor->asked ? 0 : FIEMAP_FLAG_SYNC,
                .fm_extent_count = BS_FIEMAP_RECORDS,
        };
        cursor->asked = true;
        cursor->next = 0;

        int result = bs_interrupted(cursor->interrupt);

        if (result < 0)
                return result;
        result = cursor->source->ask(cursor->source->context, answer);
        if (result < 0)
                return bs_fail_call(cursor->error, "ioctl(FS_IOC_FIEMAP)", result);
        return check_answer(cursor);
}

/* Go to the next extent that holds data. */
static int advance(struct cursor *cursor)
{
        const struct fiemap *answer = cursor->answer;

        cursor->piece = (struct piece){.begin = UINT64_MAX, .end = UINT64_MAX};
        for (;;) {
                while (cursor->next < answer->fm_mapped_extents) {
                        const struct fiemap_extent *record = &answer->fm_extents[cursor->next++];
                        uint64_t end = record->fe_logical + record->fe_length;

                        if (record->fe_flags & FIEMAP_EXTENT_UNWRITTEN)
                                continue;
                        /* What was allocated ahead, beyond the end of the file, is nobody's data. */
                        cursor->piece = (struct piece){
                                .begin = record->fe_logical,
                                .end = end < cursor->limit ? end : cursor->limit,
                                .physical = record->fe_physical,
                        };
                        return 0;
                }
                if (cursor->position >= cursor->limit)
                        return 0;

                int result = ask(cursor);

                if (result < 0 || answer->fm_mapped_extents == 0)
                        return result;
        }
}

static bool is_at(const struct piece *piece, uint64_t position)
{
        return piece->begin <= position && position < piece->end;
}

/* Where a piece begins or, if the position is in it, ends. */
static uint64_t next_edge(const struct piece *piece, uint64_t position)
{
        return is_at(piece, position) ? piece->end : piece->begin;
}

/* Take note of the bytes from `position` to the next edge of either map, and return that edge. */
static int step(const struct piece *base, const struct piece *later, uint64_t position, uint64_t size,
                struct bs_fiemap_diff *out, uint64_t *edge)
{
        uint64_t base_edge = next_edge(base, position);
        uint64_t later_edge = next_edge(later, position);
        bool in_base = is_at(base, position);
        bool in_later = is_at(later, position);

        *edge = base_edge < later_edge ? base_edge : later_edge;
        if (*edge > size)
                *edge = size;
        if (in_later && in_base &&
            base->physical + (position - base->begin) == later->physical + (position - later->begin))
                return 0;
        if (in_later)
                return bs_extents_append(&out->changed, position, *edge - position);
        if (in_base)
                return bs_extents_append(&out->discarded, position, *edge - position);
        return 0;
}

static int walk(struct cursor *base, struct cursor *later, uint64_t size, struct bs_fiemap_diff *out)
{
        uint64_t position = 0;

        while (position < size) {
                int result = 0;

                if (position >= base->piece.end) {
                        out->failed_in_base = true;
                        result = advance(base);
                }
                if (result == 0 && position >= later->piece.end) {
                        out->failed_in_base = false;
                        result = advance(later);
                }
                if (result == 0)
                        result = step(&base->piece, &later->piece, position, size, out, &position);
                if (result < 0)
                        return result;
        }
        return 0;
}

int bs_fiemap_diff(const struct bs_fiemap *base, const struct bs_fiemap *later,
                   const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_fiemap_diff *out)
{
        _cleanup_(cursor_deinit) struct cursor in_base = {.answer = NULL};
        _cleanup_(cursor_deinit) struct cursor in_later = {.answer = NULL};

        *out = (struct bs_fiemap_diff){.failed_in_base = false};

        int result = cursor_init(&in_base, base, later->size, interrupt, error);

        if (result == 0)
                result = cursor_init(&in_later, later, later->size, interrupt, error);
        if (result == 0)
                result = walk(&in_base, &in_later, later->size, out);
        out->base_records = in_base.records;
        out->records = in_later.records;
        return result;
}

void bs_fiemap_diff_deinit(struct bs_fiemap_diff *diff)
{
        bs_extents_deinit(&diff->changed);
        bs_extents_deinit(&diff->discarded);
}

static int ask_kernel(void *context, struct fiemap *request)
{
        return ioctl(*(int *)context, FS_IOC_FIEMAP, request) < 0 ? -errno : 0;
}

/* Make sure that a descriptor is of a file whose map can be believed. */
static int look_at(int fd, struct bs_error *error, struct stat *status)
{
        struct fsxattr attributes;
        struct statfs filesystem;

        if (fstat(fd, status) < 0)
                return bs_fail_call(error, "fstat", -errno);
        if (!S_ISREG(status->st_mode))
                return bs_fail_range(error, "not a regular file");
        if (fstatfs(fd, &filesystem) < 0)
                return bs_fail_call(error, "fstatfs", -errno);
        if (filesystem.f_type != XFS_SUPER_MAGIC)
                return bs_fail_range(error, "not on XFS");
        if (ioctl(fd, FS_IOC_FSGETXATTR, &attributes) < 0)
                return bs_fail_call(error, "ioctl(FS_IOC_FSGETXATTR)", -errno);
        if (attributes.fsx_xflags & FS_XFLAG_REALTIME)
                return bs_fail_range(error, "on the realtime device of its XFS");
        return 0;
}

int bs_fiemap_of_files(int *base_fd, int *later_fd, struct bs_error *error, struct bs_fiemap *base,
                       struct bs_fiemap *later)
{
        struct stat of_base;
        struct stat of_later;
        int result = look_at(*base_fd, error, &of_base);

        if (result == 0)
                result = look_at(*later_fd, error, &of_later);
        if (result < 0)
                return result;
        if (of_base.st_dev != of_later.st_dev)
                return bs_fail_range(error, "the two files are on different filesystems");
        *base = (struct bs_fiemap){{ask_kernel, base_fd}, (uint64_t)of_base.st_size};
        *later = (struct bs_fiemap){{ask_kernel, later_fd}, (uint64_t)of_later.st_size};
        return 0;
}

static int hand_out(void *context, struct fiemap *request)
{
        struct bs_fiemap_replay *replay = context;
        struct fiemap_extent record;
        uint32_t given = 0;

        for (; replay->count > 0 && given < request->fm_extent_count && given < replay->at_once;
             replay->count--) {
                memcpy(&record, replay->records, sizeof(record));
                replay->records += sizeof(record);
                if (record.fe_logical < request->fm_start ||
                    record.fe_logical - request->fm_start < request->fm_length)
                        request->fm_extents[given++] = record;
        }
        request->fm_mapped_extents = given;
        return 0;
}

struct bs_fiemap_source bs_fiemap_replay_source(struct bs_fiemap_replay *replay)
{
        return (struct bs_fiemap_source){hand_out, replay};
}
