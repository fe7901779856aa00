/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_stream.h"
#include "check.h"
#include "send_image.h"

struct log {
        unsigned commands[64];
        struct bs_stream_event last;
        size_t count;
        uint64_t sum; /* of everything that was told, so that two ways of reading can be compared */
        size_t stop_at;
};

static int take(void *context, const struct bs_stream_event *event)
{
        struct log *log = context;

        CHECK(log->count < sizeof(log->commands) / sizeof(*log->commands));
        log->commands[log->count++] = event->command;
        log->last = *event;
        log->sum = log->sum * 31 + event->offset + event->length * 7 + event->position;
        for (size_t i = 0; i < BS_STREAM_ATTRIBUTES; i++) {
                for (size_t k = 0; k < event->attributes[i].length; k++)
                        log->sum = log->sum * 31 + event->attributes[i].data[k] + i;
        }
        return log->count == log->stop_at ? -ECANCELED : 0;
}

/* Read a stream in pieces of `piece` bytes. */
static int read_stream(const uint8_t *bytes, size_t length, size_t piece, struct log *log,
                       struct bs_error *error)
{
        struct bs_stream stream;
        int result = bs_stream_init(&stream, take, log, error);

        for (size_t at = 0; at < length && result == 0; at += piece) {
                size_t left = length - at;
                /* A block of its own for each piece, so that a read beyond it is noticed. */
                uint8_t *part = malloc(left < piece ? left : piece);

                CHECK(part);
                memcpy(part, bytes + at, left < piece ? left : piece);
                result = bs_stream_push(&stream, part, left < piece ? left : piece);
                free(part);
        }
        if (result == 0)
                result = bs_stream_finish(&stream);
        bs_stream_deinit(&stream);
        return result;
}

static void check_refused(const struct send_image *image, uint64_t position, const char *reason)
{
        struct log log = {.count = 0};
        struct bs_error error = {.reason = ""};

        CHECK_EQUAL(read_stream(image->bytes, image->length, SEND_IMAGE_MAX, &log, &error), -EUCLEAN);
        if (!strstr(error.reason, reason))
                fprintf(stderr, "reason is: %s\n", error.reason);
        CHECK(strstr(error.reason, reason));
        CHECK_EQUAL(error.block, position);
}

static void test_every_command(void)
{
        static const unsigned first[] = {
                BS_STREAM_SNAPSHOT,      BS_STREAM_MKFILE, BS_STREAM_RENAME, BS_STREAM_LINK,
                BS_STREAM_UPDATE_EXTENT, BS_STREAM_WRITE,  BS_STREAM_CLONE,  BS_STREAM_TRUNCATE,
        };

        for (uint32_t version = 1; version <= 2; version++) {
                struct send_image *image = send_image_of_everything(version);
                struct log log = {.count = 0};
                struct bs_error error;

                CHECK_EQUAL(read_stream(image->bytes, image->length, SEND_IMAGE_MAX, &log, &error), 0);
                CHECK_EQUAL(log.count, version == 1 ? 21 : 24);
                for (size_t i = 0; i < sizeof(first) / sizeof(*first); i++)
                        CHECK_EQUAL(log.commands[i], first[i]);
                CHECK_EQUAL(log.last.command, BS_STREAM_UTIMES);
                CHECK(log.last.attributes[BS_STREAM_PATH].data);
                CHECK_EQUAL(log.last.attributes[BS_STREAM_PATH].length, 0);
                send_image_destroy(image);
        }
}

/* The header, and then one command of which the event is looked at. */
static void read_last(const struct send_image *image, struct log *log)
{
        struct bs_error error;
        struct bs_stream stream;

        CHECK_EQUAL(bs_stream_init(&stream, take, log, &error), 0);
        CHECK_EQUAL(bs_stream_push(&stream, image->bytes, image->length), 0);
        CHECK_EQUAL(bs_stream_finish(&stream), -EUCLEAN);
        CHECK(strstr(error.reason, "ends early"));
        CHECK_EQUAL(error.block, image->length);
        bs_stream_deinit(&stream);
}

static void test_ranges(void)
{
        struct send_image *image = send_image_create(2);
        struct log log = {.count = 0};

        send_snapshot(image);
        send_extent(image, "a/b", 4096, 8192);
        read_last(image, &log);
        CHECK_EQUAL(log.last.offset, 4096);
        CHECK_EQUAL(log.last.length, 8192);
        CHECK_EQUAL(log.last.position, image->command);
        send_extent(image, "a/b", INT64_MAX - 1, 1);
        log.count = 0;
        read_last(image, &log);
        send_punch(image, "a/b", 1, 2);
        log.count = 0;
        read_last(image, &log);
        CHECK_EQUAL(log.last.offset, 1);
        CHECK_EQUAL(bs_stream_number(&log.last, BS_STREAM_SIZE), 2);
        send_truncate(image, "a/b", 77);
        log.count = 0;
        read_last(image, &log);
        CHECK_EQUAL(log.last.offset, 77);
        CHECK_EQUAL(log.last.length, 0);
        send_extent(image, "a/b", INT64_MAX, 1);
        check_refused(image, image->command, "beyond what a file can hold");
        image->length = image->command;
        send_extent(image, "a/b", UINT64_MAX, UINT64_MAX);
        check_refused(image, image->command, "beyond what a file can hold");
        send_image_destroy(image);
}

static void test_split_at_every_byte(void)
{
        for (uint32_t version = 1; version <= 2; version++) {
                struct send_image *image = send_image_of_everything(version);
                struct log whole = {.count = 0};
                struct bs_error error;

                CHECK_EQUAL(read_stream(image->bytes, image->length, SEND_IMAGE_MAX, &whole, &error), 0);
                for (size_t piece = 1; piece < image->length; piece++) {
                        struct log log = {.count = 0};

                        CHECK_EQUAL(read_stream(image->bytes, image->length, piece, &log, &error), 0);
                        CHECK_EQUAL(log.sum, whole.sum);
                        CHECK_EQUAL(log.count, whole.count);
                }
                send_image_destroy(image);
        }
}

static void test_truncated_at_every_byte(void)
{
        for (uint32_t version = 1; version <= 2; version++) {
                struct send_image *image = send_image_of_everything(version);

                for (size_t length = 0; length < image->length; length++) {
                        struct log log = {.count = 0};
                        struct bs_error error = {.reason = ""};

                        CHECK_EQUAL(read_stream(image->bytes, length, 13, &log, &error), -EUCLEAN);
                        CHECK(strstr(error.reason, "ends early"));
                        CHECK(error.block <= length);
                }
                send_image_destroy(image);
        }
}

/* Whichever bit of a stream is wrong, it is noticed: the checksum covers all but the header. */
static void test_every_flipped_bit(void)
{
        struct send_image *image = send_image_of_everything(2);

        for (size_t bit = 0; bit < image->length * 8; bit++) {
                struct log log = {.count = 0};
                struct bs_error error = {.reason = ""};

                image->bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
                CHECK_EQUAL(read_stream(image->bytes, image->length, SEND_IMAGE_MAX, &log, &error), -EUCLEAN);
                CHECK(error.reason[0]);
                image->bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        send_image_destroy(image);
}

static void test_headers(void)
{
        static const uint32_t versions[] = {0, 3, UINT32_MAX};

        for (size_t i = 0; i < sizeof(versions) / sizeof(*versions); i++) {
                struct send_image *image = send_image_create(versions[i]);

                check_refused(image, 0, "a version that is not known");
                send_image_destroy(image);
        }

        struct send_image *image = send_image_create(1);

        image->bytes[12] = ' ';
        check_refused(image, 0, "does not begin like a send stream");
        send_image_destroy(image);
}

static void test_order(void)
{
        struct send_image *image = send_image_create(1);

        send_path(image, BS_STREAM_UNLINK, "a");
        check_refused(image, SEND_HEADER_SIZE, "named first");
        image->length = SEND_HEADER_SIZE;
        send_end(image);
        check_refused(image, SEND_HEADER_SIZE, "named first");
        image->length = SEND_HEADER_SIZE;
        send_snapshot(image);
        send_snapshot(image);
        check_refused(image, image->command, "named first, and once");
        image->length = image->command;
        send_end(image);

        size_t end = image->length;

        send_raw(image, "", 1);
        check_refused(image, end, "follows the end");
        send_image_destroy(image);
}

static void test_huge_lengths(void)
{
        static const uint32_t lengths[] = {65536 - 9, 196608 - 9, INT32_MAX, UINT32_MAX};

        for (uint32_t version = 1; version <= 2; version++) {
                for (size_t i = version - 1; i < sizeof(lengths) / sizeof(*lengths); i++) {
                        struct send_image *image = send_image_create(version);
                        uint32_t length = htole32(lengths[i]);

                        send_snapshot(image);
                        send_path(image, BS_STREAM_UNLINK, "a");
                        memcpy(image->bytes + image->command, &length, sizeof(length));
                        check_refused(image, image->command, "too long");
                        send_image_destroy(image);
                }
        }
}

/* The greatest commands that there may be, in pieces. */
static void test_greatest_commands(void)
{
        static uint8_t data[200000];

        for (uint32_t version = 1; version <= 2; version++) {
                struct send_image *image = send_image_create(version);
                struct log log = {.count = 0};
                struct bs_error error;
                size_t overhead = 10 + 5 + 12 + (version == 1 ? 4 : 2);

                send_snapshot(image);
                send_begin(image, BS_STREAM_WRITE);
                send_text(image, BS_STREAM_PATH, "a");
                send_number(image, BS_STREAM_FILE_OFFSET, 0, 8);
                send_bytes(image, BS_STREAM_DATA, data, (version == 1 ? 65536 : 196608) - overhead);
                send_seal(image);
                CHECK_EQUAL(image->length - image->command, version == 1 ? 65536 : 196608);
                send_end(image);
                CHECK_EQUAL(read_stream(image->bytes, image->length, 5000, &log, &error), 0);
                CHECK_EQUAL(log.last.length, (version == 1 ? 65536 : 196608) - overhead);
                send_image_destroy(image);
        }
}

/* A command after SNAPSHOT, which is made wrong; `reason` tells how. */
static struct send_image *begun(uint32_t version, unsigned command)
{
        struct send_image *image = send_image_create(version);

        send_snapshot(image);
        send_begin(image, command);
        return image;
}

static void check_wrong(struct send_image *image, const char *reason)
{
        send_seal(image);
        check_refused(image, image->command, reason);
        send_image_destroy(image);
}

static void test_wrong_attributes(void)
{
        struct send_image *image = begun(1, BS_STREAM_UNLINK);

        check_wrong(image, "without an attribute that it needs");
        image = begun(1, BS_STREAM_UNLINK);
        send_text(image, BS_STREAM_PATH, "a");
        send_text(image, BS_STREAM_PATH, "a");
        check_wrong(image, "twice");
        image = begun(1, BS_STREAM_UNLINK);
        send_text(image, BS_STREAM_PATH, "a");
        send_number(image, BS_STREAM_MODE, 0, 8);
        check_wrong(image, "with an attribute that it cannot have");
        image = begun(1, BS_STREAM_TRUNCATE);
        send_text(image, BS_STREAM_PATH, "a");
        send_number(image, BS_STREAM_SIZE, 0, 7);
        check_wrong(image, "wrong size");
        image = begun(1, BS_STREAM_UNLINK);
        send_text(image, BS_STREAM_ATTRIBUTES, "a");
        check_wrong(image, "unknown type");
        image = begun(1, BS_STREAM_UNLINK);
        send_text(image, 0, "a");
        check_wrong(image, "unknown type");
        image = begun(1, BS_STREAM_UNLINK);
        send_raw(image,
                 "\x0f\x00\x05\x00"
                 "abc",
                 7);
        check_wrong(image, "longer than its command");
        for (size_t length = 1; length < 4; length++) {
                image = begun(1, BS_STREAM_UNLINK);
                send_raw(image, "\x0f\x00\x00", length);
                check_wrong(image, "cut short");
        }
        /* Whatever follows the data in version 2 is data. */
        image = begun(2, BS_STREAM_WRITE);
        send_text(image, BS_STREAM_DATA, "");
        send_text(image, BS_STREAM_PATH, "a");
        send_number(image, BS_STREAM_FILE_OFFSET, 0, 8);
        check_wrong(image, "without an attribute that it needs");
}

static void test_unknown_commands(void)
{
        check_wrong(begun(1, 0), "unknown command");
        check_wrong(begun(2, BS_STREAM_COMMANDS), "unknown command");
        check_wrong(begun(2, 65535), "unknown command");
        check_wrong(begun(1, BS_STREAM_FALLOCATE), "unknown command");
        check_wrong(begun(1, BS_STREAM_ENCODED_WRITE), "unknown command");
}

static void test_paths(void)
{
        static const char *const bad[] = {"/",  "/a",   "a/",   "a//b",  ".",
                                          "..", "a/..", "../a", "a/./b", "a/.."};
        static const char *const good[] = {"", "a", "...", "a/..b", ".a/b.", "\xff\n"};
        char longest[256 + 1] = "";
        struct send_image *image;

        for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
                image = begun(1, BS_STREAM_UNLINK);
                send_text(image, BS_STREAM_PATH, bad[i]);
                check_wrong(image, "a path that cannot be");
                image = begun(1, BS_STREAM_LINK);
                send_text(image, BS_STREAM_PATH, "a");
                send_text(image, BS_STREAM_PATH_LINK, bad[i]);
                check_wrong(image, "a path that cannot be");
        }
        memset(longest, 'x', 256);
        image = begun(1, BS_STREAM_UNLINK);
        send_text(image, BS_STREAM_PATH, longest);
        check_wrong(image, "a path that cannot be");
        image = begun(1, BS_STREAM_UNLINK);
        send_bytes(image, BS_STREAM_PATH, "a\0b", 3);
        check_wrong(image, "a path that cannot be");
        image = begun(1, BS_STREAM_REMOVE_XATTR);
        send_text(image, BS_STREAM_PATH, "a");
        send_text(image, BS_STREAM_XATTR_NAME, "");
        check_wrong(image, "name that cannot be");
        for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
                struct log log = {.count = 0};

                image = begun(1, BS_STREAM_UNLINK);
                send_text(image, BS_STREAM_PATH, good[i]);
                send_seal(image);
                read_last(image, &log);
                CHECK_EQUAL(log.last.attributes[BS_STREAM_PATH].length, strlen(good[i]));
                send_image_destroy(image);
        }
}

static void test_a_receiver_can_stop_it(void)
{
        struct send_image *image = send_image_of_everything(1);
        struct log log = {.stop_at = 3};
        struct bs_error error;

        CHECK_EQUAL(read_stream(image->bytes, image->length, 7, &log, &error), -ECANCELED);
        CHECK_EQUAL(log.count, 3);
        send_image_destroy(image);
}

static int read_anew(const struct send_image *image)
{
        struct log log = {.count = 0};
        struct bs_error error;
        struct bs_stream stream;
        int result = bs_stream_init(&stream, take, &log, &error);

        if (result == 0)
                result = bs_stream_push(&stream, image->bytes, image->length);
        bs_stream_deinit(&stream);
        return result;
}

static void test_allocation_failures(void)
{
        struct send_image *image = send_image_of_everything(2);

        CHECK_ALLOCATIONS(read_anew(image));
        send_image_destroy(image);
}

int main(void)
{
        test_every_command();
        test_ranges();
        test_split_at_every_byte();
        test_truncated_at_every_byte();
        test_every_flipped_bit();
        test_headers();
        test_order();
        test_huge_lengths();
        test_greatest_commands();
        test_wrong_attributes();
        test_unknown_commands();
        test_paths();
        test_a_receiver_can_stop_it();
        test_allocation_failures();
        return 0;
}
