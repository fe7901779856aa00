/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compare two maps of anything.
 *
 * The input is a header of two sizes, how many records an answer has at most, how many records are the
 * base's, and whether offsets are counted in sectors, which makes sensible maps likelier; then records. Small
 * files are compared with a model that knows every sector.
 */
#include "cleanup.h"
#include "fiemap.h"

#include <endian.h>
#include <stdlib.h>

enum {
        SECTOR = 512,
        MAX_RECORDS = 64,
        MODEL_SECTORS = 1024,
        PACKED_RECORD = 28, /* u64 logical, physical, length; u32 flags */
        SCALE = 1,          /* the three of them are in sectors */
};

struct header {
        uint64_t sizes[2];
        uint8_t at_once;
        uint8_t of_base;
        uint8_t options;
        uint8_t unused[5];
};

struct map {
        struct fiemap_extent records[MAX_RECORDS];
        size_t count;
        uint64_t size;
};

static uint64_t load(const uint8_t *from, size_t size)
{
        uint64_t value = 0;

        memcpy(&value, from, size);
        return le64toh(value);
}

static void add(struct map *map, const uint8_t *packed, uint8_t options)
{
        uint64_t unit = options & SCALE ? SECTOR : 1;

        map->records[map->count++] = (struct fiemap_extent){
                .fe_logical = load(packed, 8) * unit,
                .fe_physical = load(packed + 8, 8) * unit,
                .fe_length = load(packed + 16, 8) * unit,
                .fe_flags = (uint32_t)load(packed + 24, 4),
        };
}

/* Where each sector below `limit` lies, counted from 1; 0 for zeros. Beyond it nobody asks for more records.
 */
static void place_sectors(const struct map *map, uint64_t limit, uint64_t *places)
{
        uint64_t end = 0;

        for (size_t i = 0; i < map->count && end < limit; i++) {
                const struct fiemap_extent *record = &map->records[i];

                if (record->fe_logical >= limit)
                        continue;
                end = record->fe_logical + record->fe_length;
                for (uint64_t at = record->fe_logical; at < end && at < limit; at += SECTOR) {
                        if (!(record->fe_flags & FIEMAP_EXTENT_UNWRITTEN))
                                places[at / SECTOR] =
                                        (record->fe_physical + at - record->fe_logical) / SECTOR + 1;
                }
        }
}

static void mark(const struct bs_extents *extents, uint64_t size, uint8_t *marked)
{
        uint64_t end = 0;

        for (size_t i = 0; i < extents->count; i++) {
                const struct bs_extent *extent = &extents->items[i];

                if (extent->length == 0 || (i > 0 && extent->offset <= end) || extent->offset >= size ||
                    extent->length > size - extent->offset)
                        abort();
                end = extent->offset + extent->length;
                for (uint64_t at = extent->offset; at < end && at / SECTOR < MODEL_SECTORS; at += SECTOR)
                        marked[at / SECTOR] = 1;
        }
}

/* The answer has to be exactly the model's, when the sizes are whole sectors and not too many. */
static void check_answer(const struct map *base, const struct map *later, const struct bs_fiemap_diff *found)
{
        uint64_t was[MODEL_SECTORS] = {0};
        uint64_t now[MODEL_SECTORS] = {0};
        uint8_t changed[MODEL_SECTORS] = {0};
        uint8_t discarded[MODEL_SECTORS] = {0};

        mark(&found->changed, later->size, changed);
        mark(&found->discarded, later->size, discarded);
        if ((base->size | later->size) % SECTOR || later->size > MODEL_SECTORS * SECTOR)
                return;
        place_sectors(base, base->size < later->size ? base->size : later->size, was);
        place_sectors(later, later->size, now);
        for (size_t i = 0; i < later->size / SECTOR; i++) {
                if (changed[i] != (now[i] && now[i] != was[i]) || discarded[i] != (was[i] && !now[i]))
                        abort();
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        const struct bs_interrupt never = {.check = NULL};
        struct header header;
        struct map base = {.count = 0};
        struct map later = {.count = 0};

        if (size < sizeof(header))
                return 0;
        memcpy(&header, data, sizeof(header));
        base.size = le64toh(header.sizes[0]);
        later.size = le64toh(header.sizes[1]);
        for (size_t at = sizeof(header); size - at >= PACKED_RECORD; at += PACKED_RECORD) {
                struct map *to = base.count < header.of_base ? &base : &later;

                if (to->count == MAX_RECORDS)
                        break;
                add(to, data + at, header.options);
        }

        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff found;
        struct bs_fiemap_replay of_base = {(const uint8_t *)base.records, base.count, header.at_once};
        struct bs_fiemap_replay of_later = {(const uint8_t *)later.records, later.count, header.at_once};
        struct bs_fiemap maps[] = {
                {bs_fiemap_replay_source(&of_base), base.size},
                {bs_fiemap_replay_source(&of_later), later.size},
        };
        struct bs_error error = {.reason = NULL};
        int result = bs_fiemap_diff(&maps[0], &maps[1], &never, &error, &found);

        if (result == 0 && header.at_once > 0)
                check_answer(&base, &later, &found);
        else if (result != 0 && (result != -EUCLEAN || !error.reason))
                abort();
        return 0;
}
