/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_extents.h"
#include "check.h"
#include "cleanup.h"

enum { K = 1024, BLOCK = 4096 };

/* A file as a list of extents that ends with a hole. */
struct file {
        struct bs_btrfs_extent extents[8];
        uint64_t size;
};

struct answer {
        struct bs_extents changed;
        struct bs_extents holes;
};

static void answer_deinit(struct answer *answer)
{
        bs_extents_deinit(&answer->changed);
        bs_extents_deinit(&answer->holes);
}

static int next_in_file(void *context, struct bs_btrfs_extent *out)
{
        const struct bs_btrfs_extent **at = context;

        *out = **at;
        if (out->kind != BS_BTRFS_HOLE)
                ++*at;
        return 0;
}

static int compare(const struct file *old, const struct file *present, struct answer *out)
{
        const struct bs_btrfs_extent *before = old->extents;
        const struct bs_btrfs_extent *now = present->extents;
        struct bs_btrfs_compare request = {
                .old = {.next = next_in_file, .context = &before},
                .present = {.next = next_in_file, .context = &now},
                .old_size = old->size,
                .size = present->size,
                .block = BLOCK,
        };

        *out = (struct answer){.changed = {.count = 0}};
        return bs_btrfs_compare_extents(&request, &out->changed, &out->holes);
}

/* Expect up to two changed extents and up to one hole; an extent without length is none. */
static void check_difference(const struct file *old, const struct file *present, struct bs_extent first,
                             struct bs_extent second, struct bs_extent hole)
{
        _cleanup_(answer_deinit) struct answer answer;

        CHECK_EQUAL(compare(old, present, &answer), 0);
        CHECK_EQUAL(answer.changed.count, (first.length > 0) + (second.length > 0));
        if (first.length) {
                CHECK_EQUAL(answer.changed.items[0].offset, first.offset);
                CHECK_EQUAL(answer.changed.items[0].length, first.length);
        }
        if (second.length) {
                CHECK_EQUAL(answer.changed.items[1].offset, second.offset);
                CHECK_EQUAL(answer.changed.items[1].length, second.length);
        }
        CHECK_EQUAL(answer.holes.count, hole.length > 0);
        if (hole.length) {
                CHECK_EQUAL(answer.holes.items[0].offset, hole.offset);
                CHECK_EQUAL(answer.holes.items[0].length, hole.length);
        }
}

static const struct bs_extent none = {0, 0};

static struct bs_btrfs_extent regular(uint64_t begin, uint64_t end, uint64_t address, uint64_t offset)
{
        return (struct bs_btrfs_extent){
                .begin = begin,
                .end = end,
                .generation = 7,
                .address = address,
                .disk_length = 1024 * K,
                .offset = offset,
                .kind = BS_BTRFS_REGULAR,
        };
}

static struct bs_btrfs_extent allocated(uint64_t begin, uint64_t end)
{
        return (struct bs_btrfs_extent){.begin = begin, .end = end, .kind = BS_BTRFS_PREALLOC};
}

static struct bs_btrfs_extent text(const char *data)
{
        return (struct bs_btrfs_extent){
                .end = BLOCK,
                .kind = BS_BTRFS_INLINE,
                .data = (const uint8_t *)data,
                .data_length = (uint32_t)strlen(data),
        };
}

/* Ends the list of extents of a file. */
#define END                                                                                                  \
        {                                                                                                    \
                .kind = BS_BTRFS_HOLE                                                                        \
        }

static void test_the_same_is_unchanged(void)
{
        const struct file file = {.extents = {regular(0, 64 * K, 4096 * K, 0), END}, .size = 64 * K};
        const struct file split = {
                .extents = {regular(0, 16 * K, 4096 * K, 0), regular(16 * K, 64 * K, 4096 * K, 16 * K), END},
                .size = 64 * K,
        };

        check_difference(&file, &file, none, none, none);
        check_difference(&file, &split, none, none, none);
        check_difference(&split, &file, none, none, none);
}

static void test_every_number_counts(void)
{
        const struct file file = {.extents = {regular(0, 64 * K, 4096 * K, 0), END}, .size = 64 * K};
        const struct bs_extent all = {0, 64 * K};

        for (int field = 0; field < 6; field++) {
                struct file other = file;
                struct bs_btrfs_extent *extent = &other.extents[0];

                extent->generation += field == 0;
                extent->address += field == 1 ? BLOCK : 0;
                extent->disk_length += field == 2 ? BLOCK : 0;
                extent->offset += field == 3 ? BLOCK : 0;
                extent->compression = field == 4;
                if (field == 5)
                        *extent = allocated(0, 64 * K);
                check_difference(&other, &file, all, none, none);
                check_difference(&file, &other, field == 5 ? none : all, none, field == 5 ? all : none);
        }
}

static void test_a_write_in_the_middle(void)
{
        const struct file old = {.extents = {regular(0, 64 * K, 4096 * K, 0), END}, .size = 64 * K};
        const struct file present = {
                .extents =
                        {
                                regular(0, 16 * K, 4096 * K, 0),
                                regular(16 * K, 20 * K, 9000 * K, 0),
                                regular(20 * K, 64 * K, 4096 * K, 20 * K),
                                END,
                        },
                .size = 64 * K,
        };

        check_difference(&old, &present, (struct bs_extent){16 * K, 4 * K}, none, none);
        check_difference(&present, &old, (struct bs_extent){16 * K, 4 * K}, none, none);
}

static void test_the_same_extent_elsewhere_in_the_file(void)
{
        const struct file old = {.extents = {regular(0, 16 * K, 4096 * K, 0), END}, .size = 32 * K};
        const struct file present = {.extents = {regular(16 * K, 32 * K, 4096 * K, 0), END}, .size = 32 * K};

        check_difference(&old, &present, (struct bs_extent){16 * K, 16 * K}, none,
                         (struct bs_extent){0, 16 * K});
}

static void test_holes(void)
{
        const struct file data = {.extents = {regular(0, 64 * K, 4096 * K, 0), END}, .size = 64 * K};
        const struct file punched = {
                .extents = {regular(0, 8 * K, 4096 * K, 0), regular(12 * K, 64 * K, 4096 * K, 12 * K), END},
                .size = 64 * K,
        };
        const struct file zeroed = {
                .extents = {regular(0, 8 * K, 4096 * K, 0), allocated(8 * K, 12 * K),
                            regular(12 * K, 64 * K, 4096 * K, 12 * K), END},
                .size = 64 * K,
        };
        const struct file empty = {.extents = {END}, .size = 64 * K};
        const struct bs_extent middle = {8 * K, 4 * K};

        check_difference(&data, &punched, none, none, middle);
        check_difference(&data, &zeroed, none, none, middle);
        check_difference(&punched, &zeroed, none, none, none);
        check_difference(&zeroed, &punched, none, none, none);
        check_difference(&punched, &data, middle, none, none);
        check_difference(&data, &empty, none, none, (struct bs_extent){0, 64 * K});
        check_difference(&empty, &data, (struct bs_extent){0, 64 * K}, none, none);
        check_difference(&empty, &empty, none, none, none);
}

static void test_inline_data(void)
{
        const struct file old = {.extents = {text("hello"), END}, .size = 5};
        const struct file other = {.extents = {text("world"), END}, .size = 5};
        const struct file longer = {.extents = {text("hello!"), END}, .size = 6};
        const struct file grown = {.extents = {regular(0, BLOCK, 4096 * K, 0), END}, .size = 5000};
        struct file unknown = {.extents = {text(""), END}, .size = 5};

        unknown.extents[0].data = NULL;
        check_difference(&old, &old, none, none, none);
        check_difference(&old, &other, (struct bs_extent){0, 5}, none, none);
        check_difference(&old, &longer, (struct bs_extent){0, 6}, none, none);
        check_difference(&old, &grown, (struct bs_extent){0, BLOCK}, none, none);
        check_difference(&unknown, &old, (struct bs_extent){0, 5}, none, none);
        check_difference(&unknown, &unknown, (struct bs_extent){0, 5}, none, none);
}

/* Cutting a file within a block leaves its extents as they are. */
static void test_another_size(void)
{
        struct file old = {.extents = {regular(0, 64 * K, 4096 * K, 0), END}, .size = 64 * K};
        struct file present = old;

        present.size = 30 * K + 1;
        check_difference(&old, &present, (struct bs_extent){28 * K, 2 * K + 1}, none, none);
        /* Both ends lie in the middle of what is the same. */
        old.size = 10 * K;
        present.size = 50 * K;
        present.extents[0] = regular(0, 12 * K, 4096 * K, 0);
        present.extents[1] = regular(12 * K, 52 * K, 8192 * K, 0);
        present.extents[2] = (struct bs_btrfs_extent)END;
        check_difference(&old, &present, (struct bs_extent){8 * K, 42 * K}, none, none);
        old.size = 50 * K;
        present.size = 10 * K;
        present.extents[0] = regular(0, 12 * K, 4096 * K, 0);
        check_difference(&old, &present, (struct bs_extent){8 * K, 2 * K}, none, none);
        /* Ends of whole blocks need nothing. */
        present.size = 12 * K;
        old.size = 64 * K;
        check_difference(&old, &present, none, none, none);
}

static void test_what_lies_beyond_the_end_is_ignored(void)
{
        const struct file old = {
                .extents = {regular(0, 16 * K, 4096 * K, 0), regular(16 * K, 32 * K, 8192 * K, 0), END},
                .size = 16 * K,
        };
        struct file present = {
                .extents = {regular(0, 16 * K, 4096 * K, 0), allocated(16 * K, 1 << 30), END},
                .size = 16 * K,
        };

        check_difference(&old, &present, none, none, none);
        /* What was beyond the end counts as nothing when the file has grown over it. */
        present = old;
        present.size = 32 * K;
        check_difference(&old, &present, (struct bs_extent){16 * K, 16 * K}, none, none);
        present.extents[1] = allocated(16 * K, 32 * K);
        check_difference(&old, &present, none, none, none);
}

static void test_empty_files(void)
{
        const struct file empty = {.extents = {END}, .size = 0};
        const struct file data = {.extents = {regular(0, 4 * K, 4096 * K, 0), END}, .size = 1};
        const struct file largest = {.extents = {END}, .size = INT64_MAX};

        check_difference(&empty, &empty, none, none, none);
        check_difference(&data, &empty, none, none, none);
        check_difference(&empty, &data, (struct bs_extent){0, 1}, none, none);
        check_difference(&largest, &data, (struct bs_extent){0, 1}, none, none);
        check_difference(&data, &largest, none, none, (struct bs_extent){0, 4 * K});
}

static int answer_of(const struct file *old, const struct file *present)
{
        _cleanup_(answer_deinit) struct answer answer;

        return compare(old, present, &answer);
}

static void test_allocations(void)
{
        const struct file old = {
                .extents = {regular(0, 16 * K, 4096 * K, 0), regular(32 * K, 64 * K, 8192 * K, 0), END},
                .size = 64 * K,
        };
        const struct file present = {.extents = {regular(0, 16 * K, 9000 * K, 0), END}, .size = 64 * K};

        CHECK_ALLOCATIONS(answer_of(&old, &present));
}

/* The state of a file, and back. */

static void remember(const struct file *file, struct bs_bytes *out)
{
        struct bs_btrfs_state_place place;

        bs_btrfs_state_begin(out, BLOCK, &place);
        for (size_t i = 0; file->extents[i].kind != BS_BTRFS_HOLE; i++)
                bs_btrfs_state_add(out, &place, &file->extents[i]);
        CHECK_EQUAL(bs_bytes_status(out), 0);
}

static const struct file every_kind = {
        .extents =
                {
                        {.begin = 0, .end = BLOCK, .kind = BS_BTRFS_INLINE, .compression = 3},
                        {.begin = 8 * K, .end = 12 * K, .kind = BS_BTRFS_PREALLOC},
                        {.begin = 12 * K,
                         .end = 1 << 30,
                         .kind = BS_BTRFS_REGULAR,
                         .compression = 2,
                         .generation = 1ULL << 40,
                         .address = 5ULL << 40,
                         .disk_length = 1ULL << 30,
                         .offset = 4 * K},
                        {.begin = 1ULL << 40,
                         .end = (1ULL << 40) + BLOCK,
                         .kind = BS_BTRFS_REGULAR,
                         .generation = 3,
                         .address = BLOCK,
                         .disk_length = BLOCK},
                        END,
                },
};

static void test_a_state_comes_back(void)
{
        struct bs_bytes state = {.data = NULL};
        struct bs_btrfs_state_place place;
        struct bs_btrfs_extent extent;

        remember(&every_kind, &state);

        struct bs_span span = {.data = state.data, .left = state.count};

        CHECK(bs_btrfs_state_is_valid(&span, BLOCK));
        CHECK(!bs_btrfs_state_is_valid(&span, 2 * BLOCK));
        CHECK(bs_btrfs_state_open(&span, BLOCK, &place));
        for (size_t i = 0; every_kind.extents[i].kind != BS_BTRFS_HOLE; i++) {
                const struct bs_btrfs_extent *wanted = &every_kind.extents[i];

                CHECK(bs_btrfs_state_take(&span, &place, &extent));
                CHECK(extent.kind == wanted->kind && extent.begin == wanted->begin);
                CHECK(extent.end == wanted->end && extent.compression == wanted->compression);
                CHECK(extent.generation == wanted->generation && extent.address == wanted->address);
                CHECK(extent.disk_length == wanted->disk_length && extent.offset == wanted->offset);
        }
        CHECK(bs_btrfs_state_take(&span, &place, &extent));
        CHECK_EQUAL(extent.kind, BS_BTRFS_HOLE);
        bs_bytes_deinit(&state);
}

/* The vector of docs/design.md. */
static void test_the_vector(void)
{
        static const uint8_t vector[] = {
                0x01, 0x0c, 0x00, 0x00, 0x01, 0x02, 0x01, 0x02, 0x0d, 0x00, 0x20, 0x12,
                0x80, 0x40, 0x03, 0x00, 0x01, 0x01, 0x04, 0x02, 0x02, 0x01, 0x01,
        };
        const struct file file = {
                .extents =
                        {
                                {.begin = 0, .end = BLOCK, .kind = BS_BTRFS_INLINE},
                                {.begin = 2 * BLOCK, .end = 4 * BLOCK, .kind = BS_BTRFS_PREALLOC},
                                {.begin = 4 * BLOCK,
                                 .end = 36 * BLOCK,
                                 .kind = BS_BTRFS_REGULAR,
                                 .compression = 3,
                                 .generation = 9,
                                 .address = 4096ULL * BLOCK,
                                 .disk_length = 3 * BLOCK},
                                {.begin = 37 * BLOCK,
                                 .end = 41 * BLOCK,
                                 .kind = BS_BTRFS_REGULAR,
                                 .generation = 10,
                                 .address = 4100ULL * BLOCK,
                                 .disk_length = 1 * BLOCK,
                                 .offset = 1 * BLOCK},
                                END,
                        },
        };
        struct bs_bytes state = {.data = NULL};

        remember(&file, &state);
        CHECK_EQUAL(state.count, sizeof(vector));
        CHECK(memcmp(state.data, vector, sizeof(vector)) == 0);
        bs_bytes_deinit(&state);
}

/* However it is cut or changed, a state is read without harm, and one that is refused means that all differs.
 */
static void test_hostile_states(void)
{
        const struct file present = {.extents = {regular(0, 16 * K, 4096 * K, 0), END}, .size = 16 * K};
        struct bs_bytes state = {.data = NULL};

        remember(&every_kind, &state);
        for (size_t at = 1; at < state.count; at++) {
                for (unsigned value = 0; value < 256; value += 5) {
                        uint8_t was = state.data[at];
                        struct bs_span span = {.data = state.data, .left = state.count};
                        struct bs_btrfs_state_extents extents;
                        const struct bs_btrfs_extent *now = present.extents;
                        _cleanup_(answer_deinit) struct answer answer = {.changed = {.count = 0}};

                        state.data[at] = (uint8_t)value;
                        bs_btrfs_state_extents_init(&span, BLOCK, &extents);

                        struct bs_btrfs_compare request = {
                                .old = bs_btrfs_state_source(&extents),
                                .present = {.next = next_in_file, .context = &now},
                                .old_size = 1ULL << 41,
                                .size = present.size,
                                .block = BLOCK,
                        };

                        CHECK_EQUAL(bs_btrfs_compare_extents(&request, &answer.changed, &answer.holes), 0);
                        CHECK_EQUAL(answer.changed.items[0].offset, 0);
                        CHECK_EQUAL(answer.changed.items[0].length, 16 * K);
                        state.data[at] = was;
                }
        }
        bs_bytes_deinit(&state);
}

static void check_unknown(const struct bs_span *state)
{
        const struct file present = {
                .extents = {regular(0, 16 * K, 4096 * K, 0), allocated(16 * K, 20 * K), END},
                .size = 64 * K,
        };
        struct bs_btrfs_state_extents extents;
        const struct bs_btrfs_extent *now = present.extents;
        _cleanup_(answer_deinit) struct answer answer = {.changed = {.count = 0}};

        bs_btrfs_state_extents_init(state, BLOCK, &extents);

        struct bs_btrfs_compare request = {
                .old = bs_btrfs_state_source(&extents),
                .present = {.next = next_in_file, .context = &now},
                .old_size = 64 * K,
                .size = 64 * K,
                .block = BLOCK,
        };

        CHECK_EQUAL(bs_btrfs_compare_extents(&request, &answer.changed, &answer.holes), 0);
        CHECK_EQUAL(answer.changed.count, 1);
        CHECK_EQUAL(answer.changed.items[0].length, 16 * K);
        CHECK_EQUAL(answer.holes.count, 1);
        CHECK_EQUAL(answer.holes.items[0].length, 48 * K);
}

static void test_states_of_other_kinds(void)
{
        static const uint8_t listing[] = {BS_BTRFS_STATE_LISTING};
        static const uint8_t version[] = {2, 12};
        static const uint8_t sector[] = {1, 200};
        static const uint8_t compressed[] = {1, 12, 0x21, 0, 1, 0, 0, 0, 0};
        static const uint8_t hole[] = {1, 12, 3, 0, 1};

        check_unknown(&(struct bs_span){.data = listing, .left = sizeof(listing)});
        check_unknown(&(struct bs_span){.data = version, .left = sizeof(version)});
        check_unknown(&(struct bs_span){.data = version, .left = 1});
        check_unknown(&(struct bs_span){.data = sector, .left = sizeof(sector)});
        check_unknown(&(struct bs_span){.data = compressed, .left = sizeof(compressed)});
        check_unknown(&(struct bs_span){.data = hole, .left = sizeof(hole)});
}

int main(void)
{
        test_the_same_is_unchanged();
        test_every_number_counts();
        test_a_write_in_the_middle();
        test_the_same_extent_elsewhere_in_the_file();
        test_holes();
        test_inline_data();
        test_another_size();
        test_what_lies_beyond_the_end_is_ignored();
        test_empty_files();
        test_allocations();
        test_a_state_comes_back();
        test_the_vector();
        test_hostile_states();
        test_states_of_other_kinds();
        return 0;
}
