/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "thin_image.h"

static const struct bs_interrupt never = {.check = NULL};

static int find_in(const struct bs_reader *reader, uint64_t device_id, struct bs_error *error,
                   struct bs_thin_view *out)
{
        *error = (struct bs_error){.call = NULL};
        return bs_thin_find(reader, 0, device_id, &never, error, out);
}

/* Expect that device 1 is refused because of `block`, with a reason that contains `reason`. */
static void check_refused(struct image *image, uint64_t blocks, uint64_t block, const char *reason)
{
        struct bs_reader reader = image_reader(image, blocks);
        struct bs_error error;
        struct bs_thin_view view;

        CHECK_EQUAL(find_in(&reader, 1, &error, &view), -EUCLEAN);
        CHECK(error.reason && !error.call);
        CHECK_EQUAL(error.block, block);
        if (!strstr(error.reason, reason))
                fprintf(stderr, "reason is: %s\n", error.reason);
        CHECK(strstr(error.reason, reason));
}

static struct image *image_of_one_device(void)
{
        struct image *image = image_create();

        image_node(image, 10, LEAF, 8);
        image_map(image, 10, 3, 1);
        image_device(image, 1, 10, 1);
        return image;
}

static void test_find(void)
{
        struct image *image = image_of_one_device();
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_view view;
        struct bs_error error;

        image_device(image, 7, 11, 99);
        CHECK_EQUAL(find_in(&reader, 7, &error, &view), 0);
        CHECK_EQUAL(view.superblock.time, 5);
        CHECK_EQUAL(view.superblock.transaction_id, 77);
        CHECK_EQUAL(view.superblock.chunk_size, 65536);
        CHECK_EQUAL(view.superblock.metadata_blocks, IMAGE_BLOCKS);
        CHECK_EQUAL(view.device.root, 11);
        CHECK_EQUAL(view.device.mapped_blocks, 99);
        CHECK_EQUAL(view.device.transaction_id, 47);
        CHECK_EQUAL(view.device.creation_time, 3);
        CHECK_EQUAL(view.device.snapshotted_time, 4);
        CHECK_EQUAL(find_in(&reader, 0, &error, &view), -ENOKEY);
        CHECK_EQUAL(find_in(&reader, 2, &error, &view), -ENOKEY);
        CHECK_EQUAL(find_in(&reader, UINT64_MAX, &error, &view), -ENOKEY);
        CHECK_ALLOCATIONS(find_in(&reader, 1, &error, &view));
        image_destroy(image);
}

static void test_find_in_a_deep_tree(void)
{
        struct image *image = image_create();
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_view view;
        struct bs_error error;

        for (uint64_t id = 0; id < 100; id++)
                image_device(image, id * 2, 500 + id, id);
        /* The top level gets a root with two children: the old leaf moves to block 20. */
        memcpy(image->blocks[20], image->blocks[1], BS_THIN_BLOCK_SIZE);
        image_poke64(image, 20, 8, 20);
        image_seal(image, 20);
        image_node(image, 21, LEAF, 8);
        image_add(image, 21, 1000, 900);
        image_node(image, 1, INTERNAL, 8);
        image_add(image, 1, 0, 20);
        image_add(image, 1, 999, 21);
        for (uint64_t id = 0; id < 100; id++) {
                CHECK_EQUAL(find_in(&reader, id * 2, &error, &view), 0);
                CHECK_EQUAL(view.device.root, 500 + id);
                CHECK_EQUAL(find_in(&reader, id * 2 + 1, &error, &view), -ENOKEY);
        }
        /* Its details are missing, which counts as no device. */
        CHECK_EQUAL(find_in(&reader, 1000, &error, &view), -ENOKEY);
        CHECK_EQUAL(find_in(&reader, 999, &error, &view), -ENOKEY);
        image_destroy(image);
}

static void test_damaged_superblocks(void)
{
        static const struct {
                size_t offset;
                uint32_t value;
                const char *reason;
        } cases[] = {
                {8, 1, "another block's number"},    {32, 1, "not a thin-pool superblock"},
                {40, 0, "unknown metadata version"}, {40, 3, "unknown metadata version"},
                {192, 0, "space map is empty"},      {192, IMAGE_BLOCKS + 1, "smaller than the pool expects"},
                {336, 0, "impossible chunk size"},   {336, 64, "impossible chunk size"},
                {336, 129, "impossible chunk size"}, {336, 2097152 + 128, "impossible chunk size"},
                {340, 1, "not 4096 bytes"},          {340, 0x80000008, "not 4096 bytes"},
                {360, 1, "incompatible features"},
        };

        for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
                struct image *image = image_of_one_device();

                image_poke32(image, 0, cases[i].offset, cases[i].value);
                image_seal(image, 0);
                check_refused(image, IMAGE_BLOCKS, 0, cases[i].reason);
                image_destroy(image);
        }

        struct image *image = image_of_one_device();

        image_poke32(image, 0, 4000, 1);
        check_refused(image, IMAGE_BLOCKS, 0, "wrong checksum");
        check_refused(image, 0, 0, "smaller than one block");
        image_destroy(image);
}

static void test_damaged_nodes(void)
{
        static const struct {
                size_t offset;
                uint32_t value;
                const char *reason;
        } cases[] = {
                {4, 0, "neither internal nor a leaf"},
                {4, 3, "neither internal nor a leaf"},
                {8, 9, "another block's number"},
                {16, 253, "more entries than it has room for"},
                {20, 255, "claims more entries than fit"},
                {20, UINT32_MAX, "claims more entries than fit"},
                {24, 0, "wrong size"},
                {24, 16, "wrong size"},
                {32, 8, "do not ascend"},
        };

        for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
                struct image *image = image_of_one_device();

                image_device(image, 8, 11, 0);
                image_poke32(image, 1, cases[i].offset, cases[i].value);
                image_seal(image, 1);
                check_refused(image, IMAGE_BLOCKS, 1, cases[i].reason);
                image_destroy(image);
        }

        struct image *image = image_of_one_device();

        image_poke32(image, 1, 4092, 1);
        check_refused(image, IMAGE_BLOCKS, 1, "wrong checksum");
        image_destroy(image);
}

static void test_damaged_trees(void)
{
        struct image *image = image_of_one_device();

        image_node(image, 1, INTERNAL, 8);
        check_refused(image, IMAGE_BLOCKS, 1, "no children");
        image_add(image, 1, 0, 1);
        check_refused(image, IMAGE_BLOCKS, 1, "too deep");
        image_node(image, 1, INTERNAL, 8);
        image_add(image, 1, 0, IMAGE_BLOCKS);
        check_refused(image, IMAGE_BLOCKS, IMAGE_BLOCKS, "beyond the metadata");
        image_node(image, 1, INTERNAL, 8);
        image_add(image, 1, 0, 0);
        check_refused(image, IMAGE_BLOCKS, 0, "superblock as a node");
        image_node(image, 1, INTERNAL, 8);
        image_node(image, 20, LEAF, 8);
        image_add(image, 20, 2, 10);
        image_add(image, 1, 0, 20);
        image_add(image, 1, 2, 21);
        check_refused(image, IMAGE_BLOCKS, 20, "belongs elsewhere");
        image_node(image, 1, LEAF, 8);
        image_add(image, 1, 1, UINT64_MAX);
        check_refused(image, IMAGE_BLOCKS, UINT64_MAX, "beyond the metadata");
        image_destroy(image);
}

static void test_block_0_in_mid_write_is_read_again(void)
{
        struct image *image = image_of_one_device();
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_view view;
        struct bs_error error;

        image->torn_reads = 7;
        CHECK_EQUAL(find_in(&reader, 1, &error, &view), 0);
        image->torn_reads = 1000;
        CHECK_EQUAL(find_in(&reader, 1, &error, &view), -EUCLEAN);
        CHECK_EQUAL(error.block, 0);
        image_destroy(image);
}

static void test_a_commit_in_between_starts_over(void)
{
        struct image *image = image_of_one_device();
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_thin_view view;
        struct bs_error error;

        image->commits = 100;
        CHECK_EQUAL(find_in(&reader, 1, &error, &view), 0);
        CHECK_EQUAL(view.superblock.transaction_id, 177);
        image->commits = UINT32_MAX;
        CHECK_EQUAL(find_in(&reader, 1, &error, &view), -EAGAIN);
        CHECK(strstr(error.call, "commits all the time"));
        image_destroy(image);
}

static int refuse(void *context)
{
        (void)context;
        return 1;
}

static void test_interrupt_and_read_errors(void)
{
        struct image *image = image_of_one_device();
        struct bs_reader reader = image_reader(image, IMAGE_BLOCKS);
        struct bs_interrupt stop = {.check = refuse};
        struct bs_thin_view view;
        struct bs_error error;

        image->commits = 100;
        CHECK_EQUAL(bs_thin_find(&reader, 0, 1, &stop, &error, &view), -EINTR);
        image->commits = 0;
        image->bad_block = 2;
        CHECK_EQUAL(find_in(&reader, 1, &error, &view), -EIO);
        CHECK(strcmp(error.call, "pread") == 0);
        image_destroy(image);
}

int main(void)
{
        test_find();
        test_find_in_a_deep_tree();
        test_damaged_superblocks();
        test_damaged_nodes();
        test_damaged_trees();
        test_block_0_in_mid_write_is_read_again();
        test_a_commit_in_between_starts_over();
        test_interrupt_and_read_errors();
        return 0;
}
