/* SPDX-License-Identifier: Apache-2.0 */
#include "send_image.h"

#include "check.h"
#include "crc32c.h"

#include <endian.h>
#include <linux/falloc.h>

static void store(uint8_t *to, uint64_t value, size_t size)
{
        value = htole64(value);
        memcpy(to, &value, size);
}

void send_raw(struct send_image *image, const void *data, size_t length)
{
        CHECK(length <= SEND_IMAGE_MAX - image->length);
        if (length > 0)
                memcpy(image->bytes + image->length, data, length);
        image->length += length;
}

static void raw_number(struct send_image *image, uint64_t value, size_t size)
{
        uint8_t bytes[8];

        store(bytes, value, 8);
        send_raw(image, bytes, size);
}

struct send_image *send_image_create(uint32_t version)
{
        struct send_image *image = bs_alloc_zeroed(sizeof(*image));

        CHECK(image);
        send_raw(image, "btrfs-stream", 13);
        raw_number(image, version, 4);
        return image;
}

void send_image_destroy(struct send_image *image)
{
        bs_free(image);
}

void send_begin(struct send_image *image, unsigned command)
{
        image->command = image->length;
        raw_number(image, 0, 4);
        raw_number(image, command, 2);
        raw_number(image, 0, 4);
}

void send_bytes(struct send_image *image, unsigned attribute, const void *data, size_t length)
{
        raw_number(image, attribute, 2);
        if (attribute != BS_STREAM_DATA || image->bytes[13] < 2)
                raw_number(image, length, 2);
        send_raw(image, data, length);
}

void send_text(struct send_image *image, unsigned attribute, const char *text)
{
        send_bytes(image, attribute, text, strlen(text));
}

void send_number(struct send_image *image, unsigned attribute, uint64_t value, size_t size)
{
        uint8_t bytes[8];

        store(bytes, value, 8);
        send_bytes(image, attribute, bytes, size);
}

void send_seal(struct send_image *image)
{
        uint8_t *command = image->bytes + image->command;
        size_t length = image->length - image->command;

        store(command, length - SEND_COMMAND_HEADER_SIZE, 4);
        store(command + 6, 0, 4);
        store(command + 6, bs_crc32c(0, command, length), 4);
}

static void uuid(struct send_image *image, unsigned attribute, int fill)
{
        uint8_t bytes[16];

        memset(bytes, fill, sizeof(bytes));
        send_bytes(image, attribute, bytes, sizeof(bytes));
}

void send_snapshot(struct send_image *image)
{
        send_begin(image, BS_STREAM_SNAPSHOT);
        send_text(image, BS_STREAM_PATH, "snapshot-2");
        uuid(image, BS_STREAM_UUID, 2);
        send_number(image, BS_STREAM_CTRANSID, 20, 8);
        uuid(image, BS_STREAM_CLONE_UUID, 1);
        send_number(image, BS_STREAM_CLONE_CTRANSID, 10, 8);
        send_seal(image);
}

void send_path(struct send_image *image, unsigned command, const char *path)
{
        send_begin(image, command);
        send_text(image, BS_STREAM_PATH, path);
        send_seal(image);
}

void send_two_paths(struct send_image *image, unsigned command, const char *path, unsigned attribute,
                    const char *other)
{
        send_begin(image, command);
        send_text(image, BS_STREAM_PATH, path);
        send_text(image, attribute, other);
        send_seal(image);
}

void send_create(struct send_image *image, unsigned command, const char *path, uint64_t inode)
{
        send_begin(image, command);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_INO, inode, 8);
        if (command == BS_STREAM_SYMLINK)
                send_text(image, BS_STREAM_PATH_LINK, "../any//where/");
        if (command == BS_STREAM_MKNOD || command == BS_STREAM_MKFIFO || command == BS_STREAM_MKSOCK) {
                send_number(image, BS_STREAM_RDEV, 259, 8);
                send_number(image, BS_STREAM_MODE, 020600, 8);
        }
        send_seal(image);
}

void send_extent(struct send_image *image, const char *path, uint64_t offset, uint64_t length)
{
        send_begin(image, BS_STREAM_UPDATE_EXTENT);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_FILE_OFFSET, offset, 8);
        send_number(image, BS_STREAM_SIZE, length, 8);
        send_seal(image);
}

void send_punch(struct send_image *image, const char *path, uint64_t offset, uint64_t length)
{
        send_begin(image, BS_STREAM_FALLOCATE);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_FALLOCATE_MODE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4);
        send_number(image, BS_STREAM_FILE_OFFSET, offset, 8);
        send_number(image, BS_STREAM_SIZE, length, 8);
        send_seal(image);
}

void send_truncate(struct send_image *image, const char *path, uint64_t size)
{
        send_begin(image, BS_STREAM_TRUNCATE);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_SIZE, size, 8);
        send_seal(image);
}

void send_times(struct send_image *image, const char *path)
{
        static const uint8_t time[12] = {1, 2, 3};

        send_begin(image, BS_STREAM_UTIMES);
        send_text(image, BS_STREAM_PATH, path);
        send_bytes(image, BS_STREAM_ATIME, time, sizeof(time));
        send_bytes(image, BS_STREAM_MTIME, time, sizeof(time));
        send_bytes(image, BS_STREAM_CTIME, time, sizeof(time));
        if (image->bytes[13] >= 2)
                send_bytes(image, BS_STREAM_OTIME, time, sizeof(time));
        send_seal(image);
}

void send_end(struct send_image *image)
{
        send_begin(image, BS_STREAM_END);
        send_seal(image);
}

static void send_attributes(struct send_image *image, const char *path)
{
        send_begin(image, BS_STREAM_SET_XATTR);
        send_text(image, BS_STREAM_PATH, path);
        send_text(image, BS_STREAM_XATTR_NAME, "user.name");
        send_bytes(image, BS_STREAM_XATTR_DATA, NULL, 0);
        send_seal(image);
        send_two_paths(image, BS_STREAM_REMOVE_XATTR, path, BS_STREAM_XATTR_NAME, "user.other");
        send_begin(image, BS_STREAM_CHMOD);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_MODE, 0644, 8);
        send_seal(image);
        send_begin(image, BS_STREAM_CHOWN);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_UID, 1, 8);
        send_number(image, BS_STREAM_GID, 2, 8);
        send_seal(image);
        send_times(image, path);
}

static void send_data(struct send_image *image, const char *path)
{
        send_extent(image, path, 4096, 8192);
        send_begin(image, BS_STREAM_WRITE);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_FILE_OFFSET, 16384, 8);
        send_text(image, BS_STREAM_DATA, "some data");
        send_seal(image);
        send_begin(image, BS_STREAM_CLONE);
        send_number(image, BS_STREAM_FILE_OFFSET, 65536, 8);
        send_number(image, BS_STREAM_CLONE_LEN, 4096, 8);
        send_text(image, BS_STREAM_PATH, path);
        uuid(image, BS_STREAM_CLONE_UUID, 1);
        send_number(image, BS_STREAM_CLONE_CTRANSID, 10, 8);
        send_text(image, BS_STREAM_CLONE_PATH, "a/source");
        send_number(image, BS_STREAM_CLONE_OFFSET, 0, 8);
        send_seal(image);
        send_truncate(image, path, 100000);
}

static void send_version_2(struct send_image *image, const char *path)
{
        send_punch(image, path, 131072, 4096);
        send_begin(image, BS_STREAM_FILEATTR);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_FILE_FLAGS, 1, 8);
        send_seal(image);
        send_begin(image, BS_STREAM_ENCODED_WRITE);
        send_text(image, BS_STREAM_PATH, path);
        send_number(image, BS_STREAM_FILE_OFFSET, 262144, 8);
        send_number(image, BS_STREAM_UNENCODED_FILE_LEN, 131072, 8);
        send_number(image, BS_STREAM_UNENCODED_LEN, 131072, 8);
        send_number(image, BS_STREAM_UNENCODED_OFFSET, 0, 8);
        send_number(image, BS_STREAM_COMPRESSION, 2, 4);
        send_number(image, BS_STREAM_ENCRYPTION, 0, 4);
        send_text(image, BS_STREAM_DATA, "packed");
        send_seal(image);
}

struct send_image *send_image_of_everything(uint32_t version)
{
        struct send_image *image = send_image_create(version);

        send_snapshot(image);
        send_create(image, BS_STREAM_MKFILE, "o257-8-0", 257);
        send_two_paths(image, BS_STREAM_RENAME, "o257-8-0", BS_STREAM_PATH_TO, "a/file");
        send_two_paths(image, BS_STREAM_LINK, "b/link", BS_STREAM_PATH_LINK, "a/file");
        send_data(image, "a/file");
        if (version >= 2)
                send_version_2(image, "a/file");
        send_attributes(image, "a/file");
        send_create(image, BS_STREAM_MKDIR, "o258-8-0", 258);
        send_create(image, BS_STREAM_MKNOD, "o259-8-0", 259);
        send_create(image, BS_STREAM_MKFIFO, "o260-8-0", 260);
        send_create(image, BS_STREAM_MKSOCK, "o261-8-0", 261);
        send_create(image, BS_STREAM_SYMLINK, "o262-8-0", 262);
        send_path(image, BS_STREAM_UNLINK, "a/gone");
        send_path(image, BS_STREAM_RMDIR, "a/empty");
        send_times(image, "");
        send_end(image);
        return image;
}
