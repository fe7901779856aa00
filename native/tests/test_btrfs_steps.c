/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_steps.h"
#include "check.h"
#include "send_image.h"

static int follow(const struct send_image *image, struct bs_steps *steps)
{
        struct bs_error error;
        struct bs_stream stream;
        int result = bs_stream_init(&stream, bs_steps_take, steps, &error);

        bs_steps_init(steps);
        if (result == 0)
                result = bs_stream_push(&stream, image->bytes, image->length);
        if (result == 0)
                result = bs_stream_finish(&stream);
        bs_stream_deinit(&stream);
        return result;
}

static void check_text(const struct bs_steps *steps, const struct bs_text *text, const char *wanted)
{
        CHECK_EQUAL(text->length, strlen(wanted));
        CHECK(text->length == 0 || memcmp(steps->text + text->offset, wanted, text->length) == 0);
}

static void check_step(const struct bs_steps *steps, size_t at, enum bs_step_kind kind, const char *path,
                       const char *other, uint64_t number)
{
        CHECK(at < steps->count);
        CHECK_EQUAL(steps->items[at].kind, kind);
        check_text(steps, &steps->items[at].path, path);
        check_text(steps, &steps->items[at].other, other);
        CHECK_EQUAL(steps->items[at].number, number);
}

static void check_range(const struct bs_steps *steps, size_t at, size_t index, uint64_t offset,
                        uint64_t length)
{
        const struct bs_step *step = &steps->items[at];

        CHECK(index < step->range_count && step->first_range + index < steps->range_count);
        CHECK_EQUAL(steps->ranges[step->first_range + index].offset, offset);
        CHECK_EQUAL(steps->ranges[step->first_range + index].length, length);
}

static void test_everything(void)
{
        struct send_image *image = send_image_of_everything(2);
        struct bs_steps steps;

        CHECK_EQUAL(follow(image, &steps), 0);
        check_step(&steps, 0, BS_STEP_CREATE, "o257-8-0", "", 257);
        check_step(&steps, 1, BS_STEP_RENAME, "o257-8-0", "a/file", 0);
        check_step(&steps, 2, BS_STEP_LINK, "b/link", "a/file", 0);
        check_step(&steps, 3, BS_STEP_DATA, "a/file", "", 0);
        CHECK_EQUAL(steps.items[3].range_count, 3);
        check_range(&steps, 3, 0, 4096, 8192);
        check_range(&steps, 3, 1, 16384, 9);
        check_range(&steps, 3, 2, 65536, 4096);
        check_step(&steps, 4, BS_STEP_RESIZE, "a/file", "", 100000);
        check_step(&steps, 5, BS_STEP_HOLE, "a/file", "", 0);
        check_range(&steps, 5, 0, 131072, 4096);
        /* The flags in between need no step of their own. */
        check_step(&steps, 6, BS_STEP_DATA, "a/file", "", 0);
        check_range(&steps, 6, 0, 262144, 131072);
        for (uint64_t inode = 258; inode <= 262; inode++) {
                char name[16];

                snprintf(name, sizeof(name), "o%d-8-0", (int)inode);
                check_step(&steps, (size_t)inode - 251,
                           inode == 258 ? BS_STEP_CREATE_DIRECTORY : BS_STEP_CREATE, name, "", inode);
        }
        check_step(&steps, 12, BS_STEP_REMOVE, "a/gone", "", 0);
        check_step(&steps, 13, BS_STEP_REMOVE, "a/empty", "", 0);
        check_step(&steps, 14, BS_STEP_TOUCH, "", "", 0);
        CHECK_EQUAL(steps.count, 15);
        bs_steps_deinit(&steps);
        CHECK_ALLOCATIONS(({
                int followed = follow(image, &steps);

                bs_steps_deinit(&steps);
                followed;
        }));
        send_image_destroy(image);
}

static void test_what_follows_is_put_together(void)
{
        struct send_image *image = send_image_create(2);
        struct bs_steps steps;

        send_snapshot(image);
        send_times(image, "a");
        send_times(image, "a");
        for (uint64_t at = 0; at < 100; at++)
                send_extent(image, "a", at * 4096, 4096);
        for (uint64_t at = 0; at < 100; at++)
                send_extent(image, "a", 1000000 + at * 8192, 4096);
        send_extent(image, "b", 0, 1);
        /* Not in order: ranges are as they come. */
        send_extent(image, "b", 10, 1);
        send_extent(image, "b", 5, 1);
        send_punch(image, "b", 100, 1);
        send_extent(image, "b", 101, 1);
        send_two_paths(image, BS_STREAM_RENAME, "b", BS_STREAM_PATH_TO, "c");
        /* Another file has the name now. */
        send_times(image, "b");
        send_path(image, BS_STREAM_UNLINK, "b");
        send_times(image, "b");
        send_end(image);
        CHECK_EQUAL(follow(image, &steps), 0);
        check_step(&steps, 0, BS_STEP_TOUCH, "a", "", 0);
        check_step(&steps, 1, BS_STEP_DATA, "a", "", 0);
        CHECK_EQUAL(steps.items[1].range_count, 101);
        check_range(&steps, 1, 0, 0, 409600);
        check_range(&steps, 1, 100, 1000000 + 99 * 8192, 4096);
        check_step(&steps, 2, BS_STEP_DATA, "b", "", 0);
        CHECK_EQUAL(steps.items[2].range_count, 3);
        check_range(&steps, 2, 2, 5, 1);
        check_step(&steps, 3, BS_STEP_HOLE, "b", "", 0);
        check_step(&steps, 4, BS_STEP_DATA, "b", "", 0);
        check_step(&steps, 5, BS_STEP_RENAME, "b", "c", 0);
        check_step(&steps, 6, BS_STEP_TOUCH, "b", "", 0);
        check_step(&steps, 7, BS_STEP_REMOVE, "b", "", 0);
        check_step(&steps, 8, BS_STEP_TOUCH, "b", "", 0);
        CHECK_EQUAL(steps.count, 9);
        /* "a" and "b" are kept once for each run of steps. */
        CHECK_EQUAL(steps.text_length, 3);
        bs_steps_deinit(&steps);
        send_image_destroy(image);
}

int main(void)
{
        test_everything();
        test_what_follows_is_put_together();
        return 0;
}
