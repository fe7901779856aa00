/* SPDX-License-Identifier: Apache-2.0 */
/* What a comparison of btrfs trees refuses: items, memory and requests that cannot be, and searches that
 * fail. */
#include "btrfs_diff.h"
#include "btrfs_tree.h"
#include "check.h"
#include "cleanup.h"

enum { INODES = 8 };

static const struct bs_interrupt never = {.check = NULL};

/* Compare the inodes 256 to 263, and forget the answer. */
static int diff_once(struct tree *tree, struct tree *base, const struct bs_bytes *memory)
{
        uint8_t numbers[8 * INODES];
        _cleanup_(bs_bytes_deinit) struct bs_bytes records = {.data = NULL};
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_btrfs_source base_source = base ? tree_source(base) : source;
        struct bs_btrfs_diff request = {
                .tree = &source,
                .base = base ? &base_source : NULL,
                .numbers = numbers,
                .count = INODES,
                .block = TREE_BLOCK,
                .remember = true,
                .limit = SIZE_MAX,
        };
        struct bs_error error = {.call = NULL};
        size_t done;

        for (size_t i = 0; i < INODES; i++)
                tree_poke(numbers + 8 * i, BS_BTRFS_FIRST_INODE + i, 8);
        if (memory)
                request.memory = (struct bs_span){.data = memory->data, .left = memory->count};

        int result = bs_btrfs_diff(&request, &never, &error, &records, &done);

        CHECK(result != -EUCLEAN || error.reason);
        return result;
}

static void test_hostile_memory(void)
{
        struct tree *tree = tree_of_files();
        struct bs_bytes memory = {.data = NULL};

        bs_bytes_add(&memory, "short", 5);
        CHECK_EQUAL(diff_once(tree, NULL, &memory), -EUCLEAN);
        bs_bytes_clear(&memory);
        /* Twice the same, or going back. */
        memory_add(&memory, 256, 5, 20, (struct bs_span){.data = (const uint8_t *)"\x81", .left = 1});
        memory_add(&memory, 256, 5, 20, (struct bs_span){.data = (const uint8_t *)"\x81", .left = 1});
        CHECK_EQUAL(diff_once(tree, NULL, &memory), -EUCLEAN);
        /* A state longer than there is. */
        bs_bytes_clear(&memory);
        memory_add(&memory, 257, 5, 20, (struct bs_span){.data = NULL});
        tree_poke(memory.data + 24, 1 << 20, 8);
        CHECK_EQUAL(diff_once(tree, NULL, &memory), -EUCLEAN);
        /* A directory has to have a listing. */
        bs_bytes_clear(&memory);
        memory_add(&memory, 256, 5, 20, (struct bs_span){.data = NULL});
        CHECK_EQUAL(diff_once(tree, NULL, &memory), -EUCLEAN);
        for (unsigned kind = 0; kind < 3; kind++) {
                uint8_t listing[] = {0x81, 2, 0, 1, 3, 'a', 'b', 'c'};

                listing[1] = kind == 0 ? 0 : 2;
                listing[3] = kind == 1 ? 9 : 1;
                listing[4] = kind == 2 ? 4 : 3;
                bs_bytes_clear(&memory);
                memory_add(&memory, 256, 5, 20, (struct bs_span){.data = listing, .left = sizeof(listing)});
                CHECK_EQUAL(diff_once(tree, NULL, &memory), -EUCLEAN);
        }
        bs_bytes_deinit(&memory);
        tree_destroy(tree);
}

static void check_bad_item(uint64_t inode, uint8_t type, uint64_t offset, size_t at, uint64_t value,
                           size_t size)
{
        struct tree *tree = tree_of_files();

        for (size_t i = 0; i < tree->count; i++) {
                const struct bs_btrfs_key key = {.objectid = inode, .type = type, .offset = offset};

                if (bs_btrfs_key_compare(&tree->items[i].key, &key) == 0)
                        tree_poke(tree->data + tree->items[i].offset + at, value, size);
        }
        CHECK_EQUAL(diff_once(tree, NULL, NULL), -EUCLEAN);
        tree_destroy(tree);
}

static void test_hostile_items(void)
{
        struct tree *tree = tree_of_files();

        check_bad_item(256, BS_BTRFS_DIR_INDEX, 2, 8, 1 + 2, 1);
        check_bad_item(256, BS_BTRFS_DIR_INDEX, 2, 27, 0, 2);
        check_bad_item(256, BS_BTRFS_DIR_INDEX, 2, 27, 3, 2);
        check_bad_item(256, BS_BTRFS_DIR_INDEX, 2, 27, 300, 2);
        check_bad_item(256, BS_BTRFS_DIR_INDEX, 2, 29, 8, 1);
        tree_name(tree, 256, 0, "zero", 300, 1);
        CHECK_EQUAL(diff_once(tree, NULL, NULL), -EUCLEAN);
        tree_remove(tree, 256, BS_BTRFS_DIR_INDEX, 0);
        check_bad_item(257, BS_BTRFS_INODE_REF, 256, 8, 300, 2);
        check_bad_item(257, BS_BTRFS_INODE_ITEM, 0, 16, UINT64_MAX, 8);
        check_bad_item(257, BS_BTRFS_EXTENT_DATA, 0, 45, 32768, 8);
        check_bad_item(257, BS_BTRFS_EXTENT_DATA, 0, 16, 8, 1);
        check_bad_item(258, BS_BTRFS_EXTENT_DATA, 0, 16, 1, 1);
        tree_remove(tree, 258, BS_BTRFS_EXTENT_DATA, 0);
        CHECK_EQUAL(diff_once(tree, NULL, NULL), -EUCLEAN);
        tree_destroy(tree);
}

static void test_requests_that_make_no_sense(void)
{
        static const uint8_t descending[16] = {1, 2, 0, 0, 0, 0, 0, 0, 1, 2};
        static const uint8_t low[8] = {255};
        struct tree *tree = tree_of_files();
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_btrfs_diff request = {
                .tree = &source, .numbers = descending, .count = 2, .block = TREE_BLOCK, .limit = 1};
        struct bs_bytes out = {.data = NULL};
        struct bs_error error;
        size_t done;

        CHECK_EQUAL(bs_btrfs_diff(&request, &never, &error, &out, &done), -ERANGE);
        request.numbers = low;
        request.count = 1;
        CHECK_EQUAL(bs_btrfs_diff(&request, &never, &error, &out, &done), -ERANGE);
        request.count = 0;
        request.block = 3000;
        CHECK_EQUAL(bs_btrfs_diff(&request, &never, &error, &out, &done), -ERANGE);
        bs_bytes_deinit(&out);
        tree_destroy(tree);
}

static void test_a_search_that_fails(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_files();

        for (tree->failing = 1; tree->failing < 4; tree->failing++) {
                tree->searches = 0;
                tree->answer_limit = 300;
                CHECK_EQUAL(diff_once(tree, base, NULL), -EIO);
        }
        tree_destroy(base);
        tree_destroy(tree);
}

int main(void)
{
        test_hostile_memory();
        test_hostile_items();
        test_requests_that_make_no_sense();
        test_a_search_that_fails();
        return 0;
}
