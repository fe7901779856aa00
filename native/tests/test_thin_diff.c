/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "cleanup.h"
#include "thin_diff.h"
#include "thin_image.h"

/* Device 1 is the base, device 2 the later one; what is behind their roots is up to each test. */
enum { BASE_ROOT = 10, DEVICE_ROOT = 11, LEAF_MAPPINGS = 100, EVERYTHING = 1000000, CHUNK_SIZE = 65536 };

static const struct bs_interrupt never = {.check = NULL};

struct answer {
        struct bs_thin_diff_result result;
        struct bs_error error;
        uint64_t missing;
};

static int diff_with(struct image *image, const struct bs_thin_diff *request,
                     const struct bs_interrupt *interrupt, struct answer *out)
{
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);

        bs_thin_diff_result_deinit(&out->result);
        memset(out, 0, sizeof(*out));
        image->reads = 0;
        return bs_thin_diff(&reader, request, interrupt, &out->error, &out->missing, &out->result);
}

static int diff_range(struct image *image, uint64_t first, uint64_t end, struct answer *out)
{
        struct bs_thin_diff request = {.base_id = 1, .device_id = 2, .first_chunk = first, .end_chunk = end};

        return diff_with(image, &request, &never, out);
}

static int diff(struct image *image, struct answer *out)
{
        return diff_range(image, 0, EVERYTHING, out);
}

static void done(struct image *image, struct answer *answer)
{
        bs_thin_diff_result_deinit(&answer->result);
        image_destroy(image);
}

/* A list is these extents, as pairs of first chunk and number of chunks. */
static void check_list(const struct bs_extents *list, size_t count, const uint64_t (*pairs)[2])
{
        CHECK_EQUAL(list->count, count);
        for (size_t i = 0; i < count; i++) {
                CHECK_EQUAL(list->items[i].offset, pairs[i][0] * CHUNK_SIZE);
                CHECK_EQUAL(list->items[i].length, pairs[i][1] * CHUNK_SIZE);
        }
}

#define CHECK_LIST(list, ...)                                                                                \
        check_list(&(list), sizeof((const uint64_t[][2]){__VA_ARGS__}) / 16,                                 \
                   (const uint64_t[][2]){__VA_ARGS__})

static void check_refused(struct image *image, const char *reason)
{
        struct answer answer = {.missing = 0};

        CHECK_EQUAL(diff(image, &answer), -EUCLEAN);
        if (!strstr(answer.error.reason, reason))
                fprintf(stderr, "reason is: %s\n", answer.error.reason);
        CHECK(strstr(answer.error.reason, reason));
        bs_thin_diff_result_deinit(&answer.result);
}

/* A leaf of LEAF_MAPPINGS chunks from `first` on. */
static void full_leaf(struct image *image, uint64_t block, uint64_t first)
{
        image_node(image, block, LEAF, 8);
        for (uint64_t chunk = first; chunk < first + LEAF_MAPPINGS; chunk++)
                image_map(image, block, chunk, 1);
}

/* The same, with one chunk mapped elsewhere. */
static void changed_leaf(struct image *image, uint64_t block, uint64_t first, uint64_t changed)
{
        image_node(image, block, LEAF, 8);
        for (uint64_t chunk = first; chunk < first + LEAF_MAPPINGS; chunk++)
                if (chunk == changed)
                        image_add(image, block, chunk, UINT64_C(900000) << 24 | 4);
                else
                        image_map(image, block, chunk, 1);
}

/* Leaves n, in block 20 + n, below one root. */
static void tree_of_leaves(struct image *image, uint64_t root, uint64_t leaves)
{
        image_node(image, root, INTERNAL, 8);
        for (uint64_t n = 0; n < leaves; n++)
                image_add(image, root, n * LEAF_MAPPINGS, 20 + n);
}

/* Two trees of ten leaves that share all but the sixth. */
static struct image *image_of_pair(void)
{
        struct image *image = image_create();

        image_device(image, 1, BASE_ROOT, 10 * LEAF_MAPPINGS);
        image_device(image, 2, DEVICE_ROOT, 10 * LEAF_MAPPINGS);
        tree_of_leaves(image, BASE_ROOT, 10);
        tree_of_leaves(image, DEVICE_ROOT, 10);
        for (uint64_t n = 0; n < 10; n++)
                full_leaf(image, 20 + n, n * LEAF_MAPPINGS);
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 5, 60);
        image_seal(image, DEVICE_ROOT);
        changed_leaf(image, 60, 500, 542);
        return image;
}

static void test_shared_nodes_are_not_read(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};

        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_LIST(answer.result.changed, {542, 1});
        CHECK_EQUAL(answer.result.discarded.count, 0);
        CHECK_EQUAL(answer.result.nodes, 4);
        /* And what nobody reads may be damaged. */
        image_poke32(image, 23, 0, 0);
        CHECK_EQUAL(diff(image, &answer), 0);
        image_poke32(image, 25, 0, 0);
        CHECK_EQUAL(diff(image, &answer), -EUCLEAN);
        done(image, &answer);
}

static void test_identical_roots(void)
{
        struct image *image = image_create();
        struct answer answer = {.missing = 0};

        image_device(image, 1, BASE_ROOT, 1000);
        image_device(image, 2, BASE_ROOT, 1000);
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_EQUAL(answer.result.nodes, 0);
        CHECK_EQUAL(answer.result.changed.count + answer.result.discarded.count, 0);
        /* Four look-ups of block 0, two upper leaves, and block 0 again. */
        CHECK_EQUAL(image->reads, 16);
        done(image, &answer);
}

static void test_empty_devices(void)
{
        struct image *image = image_create();
        struct answer answer = {.missing = 0};
        struct bs_thin_diff request = {.base_id = 3, .device_id = 2, .end_chunk = EVERYTHING};

        image_device(image, 1, BASE_ROOT, 0);
        image_device(image, 2, DEVICE_ROOT, 0);
        image_device(image, 3, 20, LEAF_MAPPINGS);
        image_node(image, BASE_ROOT, LEAF, 8);
        image_node(image, DEVICE_ROOT, LEAF, 8);
        full_leaf(image, 20, 7);
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count + answer.result.discarded.count, 0);
        CHECK_EQUAL(answer.result.nodes, 2);
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count, 0);
        CHECK_LIST(answer.result.discarded, {7, 100});
        request = (struct bs_thin_diff){.base_id = 2, .device_id = 3, .end_chunk = EVERYTHING};
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), 0);
        CHECK_LIST(answer.result.changed, {7, 100});
        CHECK_EQUAL(answer.result.discarded.count, 0);
        done(image, &answer);
}

/* Base: 0 to 9 and 20; device: 5 to 7, of which 6 is elsewhere and 7 only newer, then 9, 10, 20, 30, 31. */
static struct image *image_of_two_leaves(void)
{
        struct image *image = image_create();
        static const uint64_t kept[] = {9, 10, 20, 30, 31};

        image_device(image, 1, BASE_ROOT, 11);
        image_device(image, 2, DEVICE_ROOT, 8);
        image_node(image, BASE_ROOT, LEAF, 8);
        for (uint64_t chunk = 0; chunk < 10; chunk++)
                image_map(image, BASE_ROOT, chunk, 1);
        image_map(image, BASE_ROOT, 20, 1);
        image_node(image, DEVICE_ROOT, LEAF, 8);
        image_map(image, DEVICE_ROOT, 5, 1);
        image_add(image, DEVICE_ROOT, 6, UINT64_C(5000) << 24 | 1);
        image_map(image, DEVICE_ROOT, 7, 5);
        for (size_t i = 0; i < sizeof(kept) / sizeof(*kept); i++)
                image_map(image, DEVICE_ROOT, kept[i], 1);
        return image;
}

static void test_changed_and_discarded(void)
{
        struct image *image = image_of_two_leaves();
        struct answer answer = {.missing = 0};

        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_LIST(answer.result.changed, {6, 1}, {10, 1}, {30, 2});
        CHECK_LIST(answer.result.discarded, {0, 5}, {8, 1});
        done(image, &answer);
}

static void test_ranges(void)
{
        struct image *image = image_of_two_leaves();
        struct answer answer = {.missing = 0};

        CHECK_EQUAL(diff_range(image, 3, 31, &answer), 0);
        CHECK_LIST(answer.result.changed, {6, 1}, {10, 1}, {30, 1});
        CHECK_LIST(answer.result.discarded, {3, 2}, {8, 1});
        CHECK_EQUAL(diff_range(image, 6, 7, &answer), 0);
        CHECK_LIST(answer.result.changed, {6, 1});
        CHECK_EQUAL(answer.result.discarded.count, 0);
        CHECK_EQUAL(diff_range(image, 7, 7, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count + answer.result.nodes, 0);
        CHECK_EQUAL(diff_range(image, 0, 0, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count, 0);
        CHECK_EQUAL(diff_range(image, 0, UINT64_MAX / CHUNK_SIZE, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count, 3);
        CHECK_EQUAL(diff_range(image, 0, UINT64_MAX / CHUNK_SIZE + 1, &answer), -ERANGE);
        CHECK(strstr(answer.error.reason, "larger than 2^64"));
        done(image, &answer);
}

static void test_keys_at_the_upper_end(void)
{
        struct image *image = image_create();
        struct answer answer = {.missing = 0};

        image_device(image, 1, BASE_ROOT, 1);
        image_device(image, 2, DEVICE_ROOT, 3);
        image_node(image, BASE_ROOT, LEAF, 8);
        image_map(image, BASE_ROOT, 3, 1);
        image_node(image, DEVICE_ROOT, LEAF, 8);
        image_map(image, DEVICE_ROOT, 3, 1);
        image_add(image, DEVICE_ROOT, UINT64_MAX - 1, 5 << 24);
        image_add(image, DEVICE_ROOT, UINT64_MAX, 6 << 24);
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count, 0);
        done(image, &answer);
}

static void test_one_tree_alone(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};
        struct bs_thin_diff request = {
                .base_id = BS_THIN_NO_DEVICE,
                .device_id = 2,
                .end_chunk = EVERYTHING,
        };

        CHECK_EQUAL(diff_with(image, &request, &never, &answer), 0);
        CHECK_LIST(answer.result.changed, {0, 1000});
        CHECK_EQUAL(answer.result.nodes, 11);
        /* Of a part of the volume only the leaves of that part are read. */
        request.first_chunk = 399;
        request.end_chunk = 501;
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), 0);
        CHECK_LIST(answer.result.changed, {399, 102});
        CHECK_EQUAL(answer.result.nodes, 4);
        done(image, &answer);
}

/* The device's root was split: three levels beside two. */
static void test_trees_of_different_depth(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};
        struct bs_thin_diff backwards = {.base_id = 2, .device_id = 1, .end_chunk = EVERYTHING};

        image_node(image, DEVICE_ROOT, INTERNAL, 8);
        for (uint64_t half = 0; half < 2; half++) {
                image_add(image, DEVICE_ROOT, half * 500, 12 + half);
                image_node(image, 12 + half, INTERNAL, 8);
                for (uint64_t n = half * 5; n < half * 5 + 5; n++)
                        image_add(image, 12 + half, n * LEAF_MAPPINGS, n == 5 ? 60 : 20 + n);
        }
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_LIST(answer.result.changed, {542, 1});
        /* Both roots, the two nodes between, and the one leaf that is not shared, twice. */
        CHECK_EQUAL(answer.result.nodes, 6);
        CHECK_EQUAL(diff_with(image, &backwards, &never, &answer), 0);
        CHECK_LIST(answer.result.changed, {542, 1});
        CHECK_EQUAL(answer.result.nodes, 6);
        done(image, &answer);
}

/* In the device an only child was lifted into its parent, so that a part of its tree is a level shorter. */
static void test_a_lifted_child(void)
{
        struct image *image = image_create();
        struct answer answer = {.missing = 0};

        image_device(image, 1, BASE_ROOT, 500);
        image_device(image, 2, DEVICE_ROOT, 350);
        image_node(image, BASE_ROOT, INTERNAL, 8);
        image_add(image, BASE_ROOT, 0, 12);
        image_add(image, BASE_ROOT, 200, 13);
        image_node(image, 12, INTERNAL, 8);
        image_add(image, 12, 0, 20);
        image_add(image, 12, 100, 21);
        image_node(image, 13, INTERNAL, 8);
        for (uint64_t n = 2; n < 5; n++)
                image_add(image, 13, n * 100, 20 + n);
        for (uint64_t n = 0; n < 5; n++)
                full_leaf(image, 20 + n, n * 100);
        /* Of the first two leaves only 50 mappings are left. */
        image_node(image, DEVICE_ROOT, INTERNAL, 8);
        image_add(image, DEVICE_ROOT, 0, 30);
        image_add(image, DEVICE_ROOT, 200, 13);
        image_node(image, 30, LEAF, 8);
        for (uint64_t chunk = 60; chunk < 110; chunk++)
                image_map(image, 30, chunk, 1);
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count, 0);
        CHECK_LIST(answer.result.discarded, {0, 60}, {110, 90});
        /* The roots, 12, and three leaves, of which the short one is looked at again when it is its turn. */
        CHECK_EQUAL(answer.result.nodes, 7);
        done(image, &answer);
}

/* Two trees of three levels and `leaves` leaves of two mappings, none shared, so that there are many windows.
 */
static struct image *image_of_windows(uint64_t leaves)
{
        struct image *image = image_create();
        uint64_t next = 20;

        image_device(image, 1, BASE_ROOT, 2 * leaves);
        image_device(image, 2, DEVICE_ROOT, 2 * leaves);
        for (uint64_t side = 0; side < 2; side++) {
                uint64_t middle = 0;

                image_node(image, BASE_ROOT + side, INTERNAL, 8);
                for (uint64_t n = 0; n < leaves; n++) {
                        /* Spread out, so that block order is not key order. */
                        uint64_t block = 100 + (side * leaves + n) * 379 % 900;

                        if (n % 30 == 0) {
                                middle = next++;
                                image_add(image, BASE_ROOT + side, n * 10, middle);
                                image_node(image, middle, INTERNAL, 8);
                        }
                        image_add(image, middle, n * 10, block);
                        image_node(image, block, LEAF, 8);
                        image_map(image, block, n * 10 + 1, 1);
                        /* The device has another mapping, and every third time the same one. */
                        image_map(image, block, n * 10 + (side && n % 3 ? 3 : 2), 1);
                }
        }
        return image;
}

static void check_windows(const struct answer *answer, uint64_t leaves)
{
        uint64_t at = 0;

        for (uint64_t n = 0; n < leaves; n++) {
                if (n % 3 == 0)
                        continue;
                CHECK_EQUAL(answer->result.changed.items[at].offset, (n * 10 + 3) * CHUNK_SIZE);
                CHECK_EQUAL(answer->result.discarded.items[at].offset, (n * 10 + 2) * CHUNK_SIZE);
                at++;
        }
        CHECK_EQUAL(answer->result.changed.count, at);
        CHECK_EQUAL(answer->result.discarded.count, at);
}

static void test_many_windows(void)
{
        struct image *image = image_of_windows(400);
        struct answer answer = {.missing = 0};

        CHECK_EQUAL(diff(image, &answer), 0);
        check_windows(&answer, 400);
        /* 2 roots, 28 nodes and 800 leaves, some of the nodes more than once for two windows. */
        CHECK(answer.result.nodes >= 830 && answer.result.nodes < 870);
        CHECK_ALLOCATIONS(diff(image, &answer));
        check_windows(&answer, 400);
        done(image, &answer);
}

static int stop_at(void *context)
{
        return --*(int *)context == 0;
}

static void test_interrupt(void)
{
        struct image *image = image_of_windows(400);
        struct answer answer = {.missing = 0};
        struct bs_thin_diff request = {.base_id = 1, .device_id = 2, .end_chunk = EVERYTHING};

        for (int when = 1; when < 40; when += 13) {
                int left = when;
                struct bs_interrupt stop = {.check = stop_at, .context = &left};

                CHECK_EQUAL(diff_with(image, &request, &stop, &answer), -EINTR);
                CHECK_EQUAL(left, 0);
        }
        done(image, &answer);
}

static void test_bad_sectors(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};

        /* Let the unshared leaves lie so close that what is between them is read too. */
        changed_leaf(image, 27, 500, 542);
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 5, 27);
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 7, 29);
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 9, 62);
        image_seal(image, DEVICE_ROOT);
        full_leaf(image, 29, 700);
        full_leaf(image, 62, 900);
        image_poke64(image, BASE_ROOT, 32 + 8 * 252 + 8 * 9, 62);
        image_poke64(image, BASE_ROOT, 32 + 8 * 252 + 8 * 7, 29);
        image_seal(image, BASE_ROOT);
        image->bad_block = 26;
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_LIST(answer.result.changed, {542, 1});
        image->bad_block = 27;
        CHECK_EQUAL(diff(image, &answer), -EIO);
        CHECK(strcmp(answer.error.call, "pread") == 0);
        image->bad_block = BASE_ROOT;
        CHECK_EQUAL(diff(image, &answer), -EIO);
        done(image, &answer);
}

/* When both have been found, one of them gets another root, or both go. */
static void change_base(struct image *image)
{
        if (image->reads == 16) {
                image_poke64(image, 1, 32 + 8 * 252, 500);
                image_seal(image, 1);
        }
}

static void change_device(struct image *image)
{
        if (image->reads == 16) {
                image_poke64(image, 1, 32 + 8 * 252 + 8, 500);
                image_seal(image, 1);
        }
}

static void remove_devices(struct image *image)
{
        if (image->reads == 16)
                image_node(image, 1, LEAF, 8);
}

static void test_devices_that_change_meanwhile(void)
{
        void (*const hooks[])(struct image *) = {change_base, change_device, remove_devices};

        for (size_t i = 0; i < 3; i++) {
                struct image *image = image_of_pair();

                image->hook = hooks[i];
                check_refused(image, "changed while it was read");
                image_destroy(image);
        }
}

static void test_devices_that_are_not_there(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};
        struct bs_thin_diff request = {.base_id = 1, .device_id = 7, .end_chunk = EVERYTHING};

        CHECK_EQUAL(diff_with(image, &request, &never, &answer), -ENOKEY);
        CHECK_EQUAL(answer.missing, 7);
        request = (struct bs_thin_diff){.base_id = 8, .device_id = 2, .end_chunk = EVERYTHING};
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), -ENOKEY);
        CHECK_EQUAL(answer.missing, 8);
        done(image, &answer);
}

/* The metadata snapshot, in block 500, knows device 2 by an older root, that of the base. */
static void test_metadata_snapshot(void)
{
        struct image *image = image_of_pair();
        struct answer answer = {.missing = 0};
        struct bs_thin_diff request = {
                .base_id = 1, .device_id = 2, .end_chunk = EVERYTHING, .held_root = 500};

        image_poke64(image, 0, 56, 500);
        image_seal(image, 0);
        image_node(image, 501, LEAF, 8);
        image_add(image, 501, 1, BASE_ROOT);
        image_add(image, 501, 2, BASE_ROOT);
        memcpy(image->blocks[500], image->blocks[0], BS_THIN_BLOCK_SIZE);
        image_poke64(image, 500, 8, 500);
        image_poke64(image, 500, 56, 0);
        image_poke64(image, 500, 192, 0);
        image_poke64(image, 500, 320, 501);
        image_poke32(image, 500, 0, bs_thin_checksum(image->blocks[500], BS_THIN_SUPERBLOCK_SALT));
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), 0);
        CHECK_EQUAL(answer.result.changed.count + answer.result.nodes, 0);
        CHECK_EQUAL(diff(image, &answer), 0);
        CHECK_LIST(answer.result.changed, {542, 1});
        request.held_root = 501;
        CHECK_EQUAL(diff_with(image, &request, &never, &answer), -ERANGE);
        done(image, &answer);
}

static void test_numbers_that_do_not_agree(void)
{
        struct image *image = image_of_pair();

        image_poke64(image, 2, 32 + 8 * 126 + 24, 999);
        image_seal(image, 2);
        check_refused(image, "do not differ by as many mappings");
        image_destroy(image);
}

static void test_cycles(void)
{
        struct image *image = image_of_pair();

        /* Along an edge. */
        image_node(image, DEVICE_ROOT, INTERNAL, 8);
        image_add(image, DEVICE_ROOT, 0, DEVICE_ROOT);
        check_refused(image, "too deep");
        image_destroy(image);

        /* Between two good leaves. */
        image = image_of_pair();
        image_node(image, DEVICE_ROOT, INTERNAL, 8);
        image_add(image, DEVICE_ROOT, 0, 20);
        image_add(image, DEVICE_ROOT, 500, 12);
        image_add(image, DEVICE_ROOT, 900, 29);
        image_node(image, 12, INTERNAL, 8);
        image_add(image, 12, 500, 12);
        check_refused(image, "too deep");
        image_destroy(image);
}

/* An empty leaf is the only node that can stand at many places; reading it for all of them has to end. */
static void test_one_leaf_at_very_many_places(void)
{
        struct image *image = image_of_pair();

        image_node(image, DEVICE_ROOT, INTERNAL, 8);
        image_node(image, 900, LEAF, 8);
        for (uint64_t n = 0; n < 10; n++) {
                image_add(image, DEVICE_ROOT, n * 1000, 100 + n);
                image_node(image, 100 + n, INTERNAL, 8);
                for (uint64_t i = 0; i < 252; i++)
                        image_add(image, 100 + n, n * 1000 + i, 900);
        }
        check_refused(image, "do not differ by as many mappings");
        CHECK(image->reads < 2520 + 100);
        image_destroy(image);
}

/*
 * The base's leaf for 500 to 599 stands in the device at 0, where it tells nothing: were it skipped because
 * it is in both, what changed at 500 would be lost.
 */
static void test_a_shared_block_at_another_place(void)
{
        struct image *image = image_of_pair();

        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252, 25);
        image_seal(image, DEVICE_ROOT);
        check_refused(image, "belongs elsewhere");
        image_destroy(image);
}

static void test_hostile_nodes(void)
{
        struct image *image = image_of_pair();

        /* Keys that reach into the neighbour's. */
        changed_leaf(image, 60, 501, 542);
        check_refused(image, "belongs elsewhere");
        changed_leaf(image, 60, 500, 542);
        /* Keys that do not ascend. */
        image_poke64(image, 60, 32 + 8 * 3, 502);
        image_seal(image, 60);
        check_refused(image, "do not ascend");
        changed_leaf(image, 60, 500, 542);
        image_poke32(image, 60, 16, UINT32_MAX);
        image_seal(image, 60);
        check_refused(image, "more entries than it has room for");
        image_poke32(image, 60, 20, UINT32_MAX);
        image_seal(image, 60);
        check_refused(image, "more entries than fit a block");
        changed_leaf(image, 60, 500, 542);
        image_poke32(image, 60, 24, 24);
        image_seal(image, 60);
        check_refused(image, "wrong size");
        /* A leaf of another device's details. */
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 5, 2);
        image_seal(image, DEVICE_ROOT);
        check_refused(image, "wrong size");
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 5, IMAGE_BLOCKS);
        image_seal(image, DEVICE_ROOT);
        check_refused(image, "beyond the metadata");
        image_poke64(image, DEVICE_ROOT, 32 + 8 * 252 + 8 * 5, 0);
        image_seal(image, DEVICE_ROOT);
        check_refused(image, "superblock as a node");
        image_destroy(image);
}

static void test_a_truncated_device(void)
{
        struct image *image = image_of_pair();
        struct bs_reader reader = image_reader(image, 30);
        struct bs_thin_diff request = {.base_id = 1, .device_id = 2, .end_chunk = EVERYTHING};
        struct answer answer;

        CHECK_EQUAL(bs_thin_diff(&reader, &request, &never, &answer.error, &answer.missing, &answer.result),
                    -EUCLEAN);
        CHECK(strstr(answer.error.reason, "smaller than the pool expects"));
        image_destroy(image);
}

int main(void)
{
        test_shared_nodes_are_not_read();
        test_identical_roots();
        test_empty_devices();
        test_changed_and_discarded();
        test_ranges();
        test_keys_at_the_upper_end();
        test_one_tree_alone();
        test_trees_of_different_depth();
        test_a_lifted_child();
        test_many_windows();
        test_interrupt();
        test_bad_sectors();
        test_devices_that_change_meanwhile();
        test_devices_that_are_not_there();
        test_metadata_snapshot();
        test_numbers_that_do_not_agree();
        test_cycles();
        test_one_leaf_at_very_many_places();
        test_a_shared_block_at_another_place();
        test_hostile_nodes();
        test_a_truncated_device();
        return 0;
}
