/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap.h"
#include "check.h"
#include "thin_image.h"
#include "thin_scan.h"

enum { CHUNKS = 100000 };

static const struct bs_interrupt never = {.check = NULL};

struct answer {
        uint8_t mapped[CHUNKS / 8];
        uint8_t changed[CHUNKS / 8];
        struct bs_thin_scan_result result;
        struct bs_error error;
};

static int scan_with(struct image *image, uint64_t since, const struct bs_interrupt *interrupt,
                     struct answer *out)
{
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_scan scan = {
                .device_id = 1,
                .since = since,
                .nr_chunks = CHUNKS,
                .mapped = out->mapped,
                .changed = out->changed,
        };

        memset(out, 0, sizeof(*out));
        return bs_thin_scan(&reader, &scan, interrupt, &out->error, &out->result);
}

static int scan(struct image *image, uint64_t since, struct answer *out)
{
        return scan_with(image, since, &never, out);
}

static void check_refused(struct image *image, uint64_t block, const char *reason)
{
        struct answer answer;

        CHECK_EQUAL(scan(image, 0, &answer), -EUCLEAN);
        if (!strstr(answer.error.reason, reason))
                fprintf(stderr, "reason is: %s\n", answer.error.reason);
        CHECK(strstr(answer.error.reason, reason));
        CHECK_EQUAL(answer.error.block, block);
}

static int bit(const uint8_t *bitmap, uint64_t at)
{
        return bitmap[at / 8] >> at % 8 & 1;
}

/*
 * Device 1 with `leaves` leaves of 100 mappings each, chunk n at time n % 6, below one root; leaf n is in
 * block 20 + n * 37 % 997, so that block order is not key order.
 */
static struct image *image_of_tree(uint64_t leaves)
{
        struct image *image = image_create();

        image_device(image, 1, 10, leaves * 100);
        image_node(image, 10, INTERNAL, 8);
        for (uint64_t i = 0; i < leaves; i++) {
                uint64_t block = 20 + i * 37 % 997;

                image_add(image, 10, i * 100, block);
                image_node(image, block, LEAF, 8);
                for (uint64_t chunk = i * 100; chunk < i * 100 + 100; chunk++)
                        image_map(image, block, chunk, (uint32_t)(chunk % 6));
        }
        return image;
}

static void check_tree(const struct answer *answer, uint64_t leaves, uint64_t since)
{
        CHECK_EQUAL(answer->result.nodes, leaves + 1);
        CHECK_EQUAL(answer->result.mappings, leaves * 100);
        for (uint64_t chunk = 0; chunk < CHUNKS; chunk++) {
                CHECK_EQUAL(bit(answer->mapped, chunk), chunk < leaves * 100);
                CHECK_EQUAL(bit(answer->changed, chunk), chunk < leaves * 100 && chunk % 6 >= since);
        }
}

static void test_two_levels(void)
{
        struct image *image = image_of_tree(200);
        struct answer answer;

        for (uint64_t since = 0; since <= 5; since++) {
                CHECK_EQUAL(scan(image, since, &answer), 0);
                check_tree(&answer, 200, since);
        }
        CHECK_ALLOCATIONS(scan(image, 2, &answer));
        image_destroy(image);
}

/* The last middle nodes, from block 84 on, are not read before leaves are, from block 100 on. */
static void expect_leaves_first(struct image *image)
{
        static bool leaves;

        if (image->reads == 1)
                leaves = false;
        leaves |= image->last_block >= 100;
        CHECK(leaves || image->last_block < 84);
}

/* Three levels, and more nodes in the middle one than are looked at together. */
static void test_a_walk_goes_down_early(void)
{
        struct image *image = image_create();
        struct answer answer;

        image_device(image, 1, 10, 70 * 4 * 100);
        image_node(image, 10, INTERNAL, 8);
        for (uint64_t middle = 0; middle < 70; middle++) {
                image_add(image, 10, middle * 400, 20 + middle);
                image_node(image, 20 + middle, INTERNAL, 8);
                for (uint64_t i = 0; i < 4; i++) {
                        uint64_t first = middle * 400 + i * 100;
                        uint64_t leaf = 100 + 4 * middle + i;

                        image_add(image, 20 + middle, first, leaf);
                        image_node(image, leaf, LEAF, 8);
                        for (uint64_t n = 0; n < 100; n++)
                                image_map(image, leaf, first + n, 1);
                }
        }
        image->hook = expect_leaves_first;
        CHECK_EQUAL(scan(image, 0, &answer), 0);
        CHECK_EQUAL(answer.result.nodes, 1 + 70 + 280);
        for (uint64_t chunk = 0; chunk < CHUNKS; chunk++)
                CHECK_EQUAL(bit(answer.mapped, chunk), chunk < 28000);
        image->hook = NULL;
        CHECK_ALLOCATIONS(scan(image, 0, &answer));
        image_destroy(image);
}

static void test_neighbours_are_read_together(void)
{
        struct image *image = image_of_tree(200);
        struct answer answer;

        CHECK_EQUAL(scan(image, 0, &answer), 0);
        /* Two look-ups of four reads, the root, and 200 leaves that lie five blocks apart. */
        CHECK(image->reads <= 8 + 1 + 30);
        image_destroy(image);
}

static void test_a_bad_sector_between_nodes_does_no_harm(void)
{
        struct image *image = image_of_tree(200);
        struct answer answer;
        uint64_t gap = 20;

        while (bs_le64(image->blocks[gap] + 8) != 0)
                gap++;
        image->bad_block = gap;
        CHECK_EQUAL(scan(image, 0, &answer), 0);
        check_tree(&answer, 200, 0);
        image->bad_block = 20 + 37;
        CHECK_EQUAL(scan(image, 0, &answer), -EIO);
        CHECK(strcmp(answer.error.call, "pread") == 0);
        image_destroy(image);
}

static void test_empty_device(void)
{
        struct image *image = image_create();
        struct answer answer;

        image_device(image, 1, 10, 0);
        image_node(image, 10, LEAF, 8);
        CHECK_EQUAL(scan(image, 0, &answer), 0);
        CHECK_EQUAL(answer.result.nodes, 1);
        CHECK_EQUAL(bs_bitmap_runs(answer.mapped, sizeof(answer.mapped)), 0);
        image_destroy(image);
}

static void test_leaves_at_different_depths(void)
{
        struct image *image = image_create();
        struct answer answer;

        image_device(image, 1, 10, 3);
        image_node(image, 10, INTERNAL, 8);
        /* The bound of the first child is below its first key, as after removals. */
        image_add(image, 10, 0, 11);
        image_add(image, 10, 500, 12);
        image_node(image, 11, LEAF, 8);
        image_map(image, 11, 7, 1);
        image_node(image, 12, INTERNAL, 8);
        image_add(image, 12, 600, 13);
        image_node(image, 13, LEAF, 8);
        image_map(image, 13, 650, 2);
        image_map(image, 13, 99999, 2);
        CHECK_EQUAL(scan(image, 2, &answer), 0);
        CHECK(bit(answer.mapped, 7) && bit(answer.mapped, 650) && bit(answer.mapped, 99999));
        CHECK(!bit(answer.changed, 7) && bit(answer.changed, 650) && bit(answer.changed, 99999));
        CHECK_EQUAL(answer.result.nodes, 4);
        image_destroy(image);
}

static void test_mappings_beyond_the_volume_are_ignored(void)
{
        struct image *image = image_create();
        struct answer answer;

        image_device(image, 1, 10, 3);
        image_node(image, 10, LEAF, 8);
        image_map(image, 10, CHUNKS - 1, 1);
        image_map(image, 10, CHUNKS, 1);
        image_map(image, 10, UINT64_MAX, 1);
        CHECK_EQUAL(scan(image, 0, &answer), 0);
        CHECK_EQUAL(answer.result.mappings, 3);
        CHECK_EQUAL(bs_bitmap_runs(answer.mapped, sizeof(answer.mapped)), 1);
        image_destroy(image);
}

static void test_hostile_trees(void)
{
        struct image *image = image_of_tree(2);

        /* A cycle, with bounds that allow it. */
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, 10);
        check_refused(image, 10, "twice in the same btree");
        /* One leaf under two parents' entries. */
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, 20);
        image_add(image, 10, 50, 20);
        check_refused(image, 20, "twice in the same btree");
        /* A leaf whose keys reach into its neighbour's. */
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, 20);
        image_add(image, 10, 99, 20 + 37);
        check_refused(image, 20, "belongs elsewhere");
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, IMAGE_BLOCKS);
        check_refused(image, IMAGE_BLOCKS, "beyond the metadata");
        /* A leaf of another tree. */
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, 2);
        check_refused(image, 2, "wrong size");
        image_destroy(image);

        /* A leaf that is lost without a trace in the tree itself. */
        image = image_of_tree(3);
        image_node(image, 10, INTERNAL, 8);
        image_add(image, 10, 0, 20);
        image_add(image, 10, 100, 20 + 37);
        check_refused(image, 10, "not hold as many mappings");
        image_destroy(image);
}

static void test_a_chain_of_nodes_ends(void)
{
        struct image *image = image_create();

        image_device(image, 1, 10, 0);
        for (uint64_t block = 10; block < 10 + 200; block++) {
                image_node(image, block, INTERNAL, 8);
                image_add(image, block, 0, block + 1);
        }
        check_refused(image, 10 + BS_THIN_MAX_DEPTH, "too deep");
        image_destroy(image);
}

static void test_requests_that_would_miss_changes(void)
{
        struct image *image = image_of_tree(2);
        struct answer answer;

        CHECK_EQUAL(scan(image, 6, &answer), -ERANGE);
        CHECK(strstr(answer.error.reason, "not the same pool"));
        CHECK_EQUAL(scan(image, UINT64_MAX, &answer), -ERANGE);
        /* The superblock's time has 32 bits, that of a mapping 24. */
        image_poke32(image, 0, 44, BS_THIN_MAX_24_BITS);
        image_seal(image, 0);
        CHECK_EQUAL(scan(image, BS_THIN_MAX_24_BITS, &answer), 0);
        image_poke32(image, 0, 44, BS_THIN_MAX_24_BITS + 1);
        image_seal(image, 0);
        CHECK_EQUAL(scan(image, 0, &answer), 0);
        CHECK_EQUAL(scan(image, 1, &answer), -EUCLEAN);
        CHECK(strstr(answer.error.reason, "outgrown"));
        image_destroy(image);
}

static void test_a_volume_beyond_64_bits(void)
{
        struct image *image = image_of_tree(1);
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_scan request = {.device_id = 1, .nr_chunks = UINT64_MAX / 65536 + 1};
        struct bs_thin_scan_result result;
        struct bs_error error;

        CHECK_EQUAL(bs_thin_scan(&reader, &request, &never, &error, &result), -ERANGE);
        image_destroy(image);
}

/* Once the leaves have been read, let the device have another root. */
static void change_root(struct image *image)
{
        if (image->reads == 6) {
                image_poke64(image, 1, 32 + 8 * 252, 500);
                image_seal(image, 1);
        }
}

/* The same, but the device is gone. */
static void remove_device(struct image *image)
{
        if (image->reads == 6)
                image_node(image, 1, LEAF, 8);
}

static void test_a_device_that_changes_meanwhile(void)
{
        struct image *image = image_of_tree(2);

        image->hook = change_root;
        check_refused(image, 10, "changed while it was read");
        image_destroy(image);
        image = image_of_tree(2);
        image->hook = remove_device;
        check_refused(image, 10, "changed while it was read");
        image_destroy(image);
}

static int stop_at_second(void *context)
{
        return ++*(int *)context == 2;
}

static void test_interrupt(void)
{
        struct image *image = image_of_tree(200);
        struct answer answer;
        int asked = 0;
        struct bs_interrupt stop = {.check = stop_at_second, .context = &asked};

        CHECK_EQUAL(scan_with(image, 0, &stop, &answer), -EINTR);
        CHECK_EQUAL(asked, 2);
        image_destroy(image);
}

int main(void)
{
        test_two_levels();
        test_a_walk_goes_down_early();
        test_neighbours_are_read_together();
        test_a_bad_sector_between_nodes_does_no_harm();
        test_empty_device();
        test_leaves_at_different_depths();
        test_mappings_beyond_the_volume_are_ignored();
        test_hostile_trees();
        test_a_chain_of_nodes_ends();
        test_requests_that_would_miss_changes();
        test_a_volume_beyond_64_bits();
        test_a_device_that_changes_meanwhile();
        test_interrupt();
        return 0;
}
