/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_tree.h"
#include "check.h"
#include "cleanup.h"

#include <linux/btrfs.h>

static const struct bs_interrupt never = {.check = NULL};
static const struct bs_btrfs_range everything = {
        .last = {.objectid = UINT64_MAX, .type = UINT8_MAX, .offset = UINT64_MAX},
};

struct reading {
        struct bs_btrfs_source source;
        struct bs_error error;
        struct bs_btrfs_cursor cursor;
};

static void open_tree(struct tree *tree, size_t capacity, struct reading *out)
{
        out->source = tree_source(tree);
        out->error = (struct bs_error){.call = NULL};
        CHECK_EQUAL(bs_btrfs_cursor_init(&out->source, &never, &out->error, capacity, &out->cursor), 0);
        bs_btrfs_seek(&out->cursor, &everything);
}

/* Read all items of a range and return how many there are, or what went wrong. */
static int count_items(struct tree *tree, const struct bs_btrfs_range *range, size_t capacity)
{
        const struct bs_interrupt *interrupt = &never;
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_error error;
        _cleanup_(bs_btrfs_cursor_deinit) struct bs_btrfs_cursor cursor;
        const struct bs_btrfs_item *item;
        int result = bs_btrfs_cursor_init(&source, interrupt, &error, capacity, &cursor);

        if (result < 0)
                return result;
        bs_btrfs_seek(&cursor, range);
        for (int count = 0;; count++) {
                result = bs_btrfs_peek(&cursor, &item);
                if (result < 0)
                        return result;
                if (!item)
                        return count;
                bs_btrfs_advance(&cursor);
        }
}

static struct tree *tree_of(unsigned count)
{
        struct tree *tree = tree_create();

        for (unsigned i = 0; i < count; i++)
                tree_add(tree, 256 + i / 10, (uint8_t)(i % 10), i % 3, "0123456789abcdef", i % 17);
        return tree;
}

static void test_all_items_come_in_order(void)
{
        struct tree *tree = tree_of(1000);

        for (size_t capacity = 64; capacity < 1 << 17; capacity *= 5)
                CHECK_EQUAL(count_items(tree, &everything, capacity), 1000);
        tree_destroy(tree);
}

static void test_a_range_is_one_compound_key(void)
{
        struct tree *tree = tree_of(1000);
        struct bs_btrfs_range range = {
                .first = {.objectid = 260, .type = 3},
                .last = {.objectid = 261, .type = 4, .offset = UINT64_MAX},
        };

        CHECK_EQUAL(count_items(tree, &range, 4096), 7 + 5);
        range.first = range.last = (struct bs_btrfs_key){.objectid = 260, .type = 3, .offset = 1};
        CHECK(count_items(tree, &range, 4096) <= 1);
        tree_destroy(tree);
}

static void test_the_last_key_of_all(void)
{
        struct tree *tree = tree_create();

        tree_add(tree, UINT64_MAX, UINT8_MAX, UINT64_MAX, "x", 1);
        CHECK_EQUAL(count_items(tree, &everything, 4096), 1);
        CHECK_EQUAL(tree->searches, 1);
        tree_destroy(tree);
}

static void test_min_transid(void)
{
        struct tree *tree = tree_create();
        struct bs_btrfs_range range = everything;

        for (unsigned i = 0; i < 100; i++) {
                tree->transid = 100 + i;
                tree_add(tree, 300 + i, 1, 0, "", 0);
        }
        range.min_transid = 190;
        CHECK_EQUAL(count_items(tree, &range, 4096), 10);
        tree_destroy(tree);
}

static void test_an_item_larger_than_the_buffer(void)
{
        static const uint8_t large[40000] = {1};
        struct tree *tree = tree_create();

        tree_add(tree, 256, 1, 0, large, sizeof(large));
        tree_add(tree, 257, 1, 0, "x", 1);
        CHECK_EQUAL(count_items(tree, &everything, 64), 2);
        tree_destroy(tree);
}

static void test_forward(void)
{
        struct tree *tree = tree_of(1000);
        struct reading reading;
        const struct bs_btrfs_item *item;
        const struct bs_btrfs_key near = {.objectid = 257};
        const struct bs_btrfs_key far = {.objectid = 340, .type = 5};
        const struct bs_btrfs_key beyond = {.objectid = 1000};

        open_tree(tree, 2048, &reading);
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), 0);
        CHECK_EQUAL(item->key.objectid, 256);
        CHECK_EQUAL(bs_btrfs_forward(&reading.cursor, &near), 0);
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), 0);
        CHECK(item->key.objectid == 257 && item->key.type == 0);
        /* It was in the buffer. */
        CHECK_EQUAL(tree->searches, 1);
        /* Backwards is nowhere to go to. */
        CHECK_EQUAL(bs_btrfs_forward(&reading.cursor, &(struct bs_btrfs_key){.objectid = 1}), 0);
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), 0);
        CHECK_EQUAL(item->key.objectid, 257);
        CHECK_EQUAL(bs_btrfs_forward(&reading.cursor, &far), 0);
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), 0);
        CHECK(item->key.objectid == 340 && item->key.type == 5);
        /* What is between was not asked for. */
        CHECK_EQUAL(tree->searches, 2);
        CHECK_EQUAL(bs_btrfs_forward(&reading.cursor, &beyond), 0);
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), 0);
        CHECK(!item);
        bs_btrfs_cursor_deinit(&reading.cursor);
        tree_destroy(tree);
}

/* Answers that no kernel gives. */

static struct btrfs_ioctl_search_header header_of(const uint8_t *items)
{
        struct btrfs_ioctl_search_header header;

        memcpy(&header, items, sizeof(header));
        return header;
}

static void repeat_the_first(struct tree *tree, uint8_t *items, uint32_t *count)
{
        struct btrfs_ioctl_search_header header = header_of(items);

        (void)tree;
        if (*count > 1)
                memcpy(items + sizeof(header) + header.len, items, sizeof(header));
}

static void claim_a_length(struct tree *tree, uint8_t *items, uint32_t *count)
{
        struct btrfs_ioctl_search_header header = header_of(items);

        (void)tree;
        header.len = UINT32_MAX;
        if (*count > 0)
                memcpy(items, &header, sizeof(header));
}

static void claim_a_type(struct tree *tree, uint8_t *items, uint32_t *count)
{
        struct btrfs_ioctl_search_header header = header_of(items);

        (void)tree;
        header.type = 256 + 1;
        if (*count > 0)
                memcpy(items, &header, sizeof(header));
}

static void claim_more(struct tree *tree, uint8_t *items, uint32_t *count)
{
        (void)tree;
        memset(items + 1000, 0xff, 1048);
        *count = UINT32_MAX;
}

static void answer_from_elsewhere(struct tree *tree, uint8_t *items, uint32_t *count)
{
        struct btrfs_ioctl_search_header header = header_of(items);

        (void)tree;
        header.objectid = 5;
        if (*count > 0)
                memcpy(items, &header, sizeof(header));
}

static void test_hostile_answers(void)
{
        static void (*const hooks[])(struct tree *, uint8_t *, uint32_t *) = {
                repeat_the_first, claim_a_length, claim_a_type, claim_more, answer_from_elsewhere,
        };
        const struct bs_btrfs_range range = {
                .first = {.objectid = 256},
                .last = {.objectid = 300},
        };

        for (size_t i = 0; i < sizeof(hooks) / sizeof(*hooks); i++) {
                struct tree *tree = tree_of(30);

                tree->hook = hooks[i];
                CHECK_EQUAL(count_items(tree, &range, 2048), -EUCLEAN);
                tree_destroy(tree);
        }
}

static int overflow_for_ever(void *context, const struct bs_btrfs_range *range, void *buffer, size_t *size,
                             uint32_t *count)
{
        (void)range;
        (void)buffer;
        (void)count;
        *size = *(size_t *)context ? *(size_t *)context : *size;
        return -EOVERFLOW;
}

static void test_a_buffer_that_is_never_large_enough(void)
{
        static const size_t demands[] = {0, 100, 8192, 1ULL << 40};

        for (size_t i = 0; i < sizeof(demands) / sizeof(*demands); i++) {
                size_t demand = demands[i];
                struct bs_btrfs_source source = {.search = overflow_for_ever, .context = &demand};
                struct bs_error error;
                struct bs_btrfs_cursor cursor;
                const struct bs_btrfs_item *item;

                source.call = "search";
                CHECK_EQUAL(bs_btrfs_cursor_init(&source, &never, &error, 4096, &cursor), 0);
                bs_btrfs_seek(&cursor, &everything);
                CHECK(bs_btrfs_peek(&cursor, &item) < 0);
                CHECK(!item);
                bs_btrfs_cursor_deinit(&cursor);
        }
}

static void test_errors_are_passed_on(void)
{
        struct tree *tree = tree_of(1000);
        struct reading reading;
        const struct bs_btrfs_item *item;

        open_tree(tree, 2048, &reading);
        tree->failing = 1;
        CHECK_EQUAL(bs_btrfs_peek(&reading.cursor, &item), -EIO);
        CHECK(strcmp(reading.error.call, "search") == 0);
        bs_btrfs_cursor_deinit(&reading.cursor);
        tree_destroy(tree);
}

static int stop(void *context)
{
        return ++*(int *)context == 3;
}

static void test_interrupt(void)
{
        struct tree *tree = tree_of(1000);
        int asked = 0;
        struct bs_interrupt interrupt = {.check = stop, .context = &asked};
        struct reading reading;
        const struct bs_btrfs_item *item;
        int result = 0;

        open_tree(tree, 2048, &reading);
        reading.cursor.interrupt = &interrupt;
        while (result == 0) {
                result = bs_btrfs_peek(&reading.cursor, &item);
                bs_btrfs_advance(&reading.cursor);
        }
        CHECK_EQUAL(result, -EINTR);
        CHECK_EQUAL(tree->searches, 2);
        bs_btrfs_cursor_deinit(&reading.cursor);
        tree_destroy(tree);
}

static int count_all(struct tree *tree)
{
        int count = count_items(tree, &everything, 64);

        return count < 0 ? count : count - 2;
}

static void test_allocations(void)
{
        static const uint8_t large[4000] = {1};
        struct tree *tree = tree_create();

        tree_add(tree, 256, 1, 0, large, sizeof(large));
        tree_add(tree, 257, 1, 0, "x", 1);
        CHECK_ALLOCATIONS(count_all(tree));
        tree_destroy(tree);
}

static void test_what_is_not_btrfs(void)
{
        int fd = -1;
        struct bs_btrfs_source source;
        struct bs_error error;
        struct bs_btrfs_cursor cursor;
        const struct bs_btrfs_item *item;

        bs_btrfs_fd_source_init(&fd, &source);
        CHECK_EQUAL(bs_btrfs_cursor_init(&source, &never, &error, 4096, &cursor), 0);
        bs_btrfs_seek(&cursor, &everything);
        CHECK_EQUAL(bs_btrfs_peek(&cursor, &item), -EBADF);
        CHECK(strstr(error.call, "TREE_SEARCH"));
        bs_btrfs_cursor_deinit(&cursor);
}

int main(void)
{
        test_all_items_come_in_order();
        test_a_range_is_one_compound_key();
        test_the_last_key_of_all();
        test_min_transid();
        test_an_item_larger_than_the_buffer();
        test_forward();
        test_hostile_answers();
        test_a_buffer_that_is_never_large_enough();
        test_errors_are_passed_on();
        test_interrupt();
        test_allocations();
        test_what_is_not_btrfs();
        return 0;
}
