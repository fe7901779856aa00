/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_stream.h"

#include "crc32c.h"
#include "little_endian.h"
#include "memory.h"

#include <string.h>

enum {
        HEADER_SIZE = 17,
        COMMAND_HEADER_SIZE = 10,
        CRC_OFFSET = 6,
        /* The kernel's buffer, headers included: 64 KiB, and 16 KiB more than an extent in version 2, in
           pages. */
        COMMAND_MAX_V1 = 64 << 10,
        COMMAND_MAX_V2 = 192 << 10,
        NAME_MAX_BYTES = 255,
        PATH_MAX_BYTES = 4096,
        ANY_SIZE = -1,
};

static const uint8_t MAGIC[] = "btrfs-stream";

#define HAS(name) (UINT32_C(1) << BS_STREAM_##name)

/* What a command must and what it may have. */
struct rule {
        uint32_t required;
        uint32_t optional;
        uint32_t since;
};

static const struct rule rules[BS_STREAM_COMMANDS] = {
        [BS_STREAM_SUBVOL] = {HAS(PATH) | HAS(UUID) | HAS(CTRANSID), 0, 1},
        [BS_STREAM_SNAPSHOT] = {HAS(PATH) | HAS(UUID) | HAS(CTRANSID) | HAS(CLONE_UUID) | HAS(CLONE_CTRANSID),
                                0, 1},
        [BS_STREAM_MKFILE] = {HAS(PATH) | HAS(INO), 0, 1},
        [BS_STREAM_MKDIR] = {HAS(PATH) | HAS(INO), 0, 1},
        [BS_STREAM_MKNOD] = {HAS(PATH) | HAS(INO) | HAS(RDEV) | HAS(MODE), 0, 1},
        [BS_STREAM_MKFIFO] = {HAS(PATH) | HAS(INO), HAS(RDEV) | HAS(MODE), 1},
        [BS_STREAM_MKSOCK] = {HAS(PATH) | HAS(INO), HAS(RDEV) | HAS(MODE), 1},
        [BS_STREAM_SYMLINK] = {HAS(PATH) | HAS(INO) | HAS(PATH_LINK), 0, 1},
        [BS_STREAM_RENAME] = {HAS(PATH) | HAS(PATH_TO), 0, 1},
        [BS_STREAM_LINK] = {HAS(PATH) | HAS(PATH_LINK), 0, 1},
        [BS_STREAM_UNLINK] = {HAS(PATH), 0, 1},
        [BS_STREAM_RMDIR] = {HAS(PATH), 0, 1},
        [BS_STREAM_SET_XATTR] = {HAS(PATH) | HAS(XATTR_NAME) | HAS(XATTR_DATA), 0, 1},
        [BS_STREAM_REMOVE_XATTR] = {HAS(PATH) | HAS(XATTR_NAME), 0, 1},
        [BS_STREAM_WRITE] = {HAS(PATH) | HAS(FILE_OFFSET) | HAS(DATA), 0, 1},
        [BS_STREAM_CLONE] = {HAS(PATH) | HAS(FILE_OFFSET) | HAS(CLONE_LEN) | HAS(CLONE_UUID) |
                                     HAS(CLONE_CTRANSID) | HAS(CLONE_PATH) | HAS(CLONE_OFFSET),
                             0, 1},
        [BS_STREAM_TRUNCATE] = {HAS(PATH) | HAS(SIZE), 0, 1},
        [BS_STREAM_CHMOD] = {HAS(PATH) | HAS(MODE), 0, 1},
        [BS_STREAM_CHOWN] = {HAS(PATH) | HAS(UID) | HAS(GID), 0, 1},
        [BS_STREAM_UTIMES] = {HAS(PATH) | HAS(ATIME) | HAS(MTIME) | HAS(CTIME), HAS(OTIME), 1},
        [BS_STREAM_END] = {0, 0, 1},
        [BS_STREAM_UPDATE_EXTENT] = {HAS(PATH) | HAS(FILE_OFFSET) | HAS(SIZE), 0, 1},
        [BS_STREAM_FALLOCATE] = {HAS(PATH) | HAS(FILE_OFFSET) | HAS(SIZE) | HAS(FALLOCATE_MODE), 0, 2},
        [BS_STREAM_FILEATTR] = {HAS(PATH) | HAS(FILE_FLAGS), 0, 2},
        [BS_STREAM_ENCODED_WRITE] = {HAS(PATH) | HAS(FILE_OFFSET) | HAS(UNENCODED_FILE_LEN) |
                                             HAS(UNENCODED_LEN) | HAS(UNENCODED_OFFSET) | HAS(DATA),
                                     HAS(COMPRESSION) | HAS(ENCRYPTION), 2},
};

static const int attribute_sizes[BS_STREAM_ATTRIBUTES] = {
        [BS_STREAM_UUID] = 16,
        [BS_STREAM_CTRANSID] = 8,
        [BS_STREAM_INO] = 8,
        [BS_STREAM_SIZE] = 8,
        [BS_STREAM_MODE] = 8,
        [BS_STREAM_UID] = 8,
        [BS_STREAM_GID] = 8,
        [BS_STREAM_RDEV] = 8,
        [BS_STREAM_CTIME] = 12,
        [BS_STREAM_MTIME] = 12,
        [BS_STREAM_ATIME] = 12,
        [BS_STREAM_OTIME] = 12,
        [BS_STREAM_XATTR_NAME] = ANY_SIZE,
        [BS_STREAM_XATTR_DATA] = ANY_SIZE,
        [BS_STREAM_PATH] = ANY_SIZE,
        [BS_STREAM_PATH_TO] = ANY_SIZE,
        [BS_STREAM_PATH_LINK] = ANY_SIZE,
        [BS_STREAM_FILE_OFFSET] = 8,
        [BS_STREAM_DATA] = ANY_SIZE,
        [BS_STREAM_CLONE_UUID] = 16,
        [BS_STREAM_CLONE_CTRANSID] = 8,
        [BS_STREAM_CLONE_PATH] = ANY_SIZE,
        [BS_STREAM_CLONE_OFFSET] = 8,
        [BS_STREAM_CLONE_LEN] = 8,
        [BS_STREAM_FALLOCATE_MODE] = 4,
        [BS_STREAM_FILE_FLAGS] = 8,
        [BS_STREAM_UNENCODED_FILE_LEN] = 8,
        [BS_STREAM_UNENCODED_LEN] = 8,
        [BS_STREAM_UNENCODED_OFFSET] = 8,
        [BS_STREAM_COMPRESSION] = 4,
        [BS_STREAM_ENCRYPTION] = 4,
};

static int refuse(const struct bs_stream *stream, const char *reason)
{
        return bs_fail_block(stream->error, stream->position, reason);
}

uint64_t bs_stream_number(const struct bs_stream_event *event, enum bs_stream_attribute attribute)
{
        const struct bs_slice *slice = &event->attributes[attribute];

        return slice->length == 4 ? bs_le32(slice->data) : bs_le64(slice->data);
}

/* Take the next attribute off `left`. */
static int next_attribute(const struct bs_stream *stream, struct bs_slice *left,
                          struct bs_stream_event *event)
{
        if (left->length < 2)
                return refuse(stream, "an attribute is cut short");

        unsigned type = bs_le16(left->data);
        size_t head = stream->version >= 2 && type == BS_STREAM_DATA ? 2 : 4;

        if (left->length < head)
                return refuse(stream, "an attribute is cut short");

        size_t length = head == 2 ? left->length - head : bs_le16(left->data + 2);

        if (length > left->length - head)
                return refuse(stream, "an attribute is longer than its command");
        if (type == 0 || type >= BS_STREAM_ATTRIBUTES)
                return refuse(stream, "an attribute of an unknown type");
        if (attribute_sizes[type] != ANY_SIZE && length != (size_t)attribute_sizes[type])
                return refuse(stream, "an attribute has the wrong size");
        if (event->attributes[type].data)
                return refuse(stream, "an attribute is twice in a command");
        event->attributes[type] = (struct bs_slice){left->data + head, length};
        left->data += head + length;
        left->length -= head + length;
        return 0;
}

/* Whether a path is one below the subvolume, without detours; that of the subvolume itself is empty. */
static bool path_is_sound(const struct bs_slice *path)
{
        const uint8_t *at = path->data;
        const uint8_t *end = at + path->length;

        if (path->length > PATH_MAX_BYTES || memchr(at, 0, path->length))
                return false;
        if (path->length == 0)
                return true;
        for (;;) {
                const uint8_t *slash = memchr(at, '/', (size_t)(end - at));
                size_t length = (size_t)((slash ? slash : end) - at);

                if (length == 0 || length > NAME_MAX_BYTES || (length <= 2 && memcmp(at, "..", length) == 0))
                        return false;
                if (!slash)
                        return true;
                at = slash + 1;
        }
}

static int check_names(const struct bs_stream *stream, const struct bs_stream_event *event)
{
        const struct bs_slice *name = &event->attributes[BS_STREAM_XATTR_NAME];
        const struct bs_slice *target = &event->attributes[BS_STREAM_PATH_LINK];
        static const enum bs_stream_attribute paths[] = {BS_STREAM_PATH, BS_STREAM_PATH_TO,
                                                         BS_STREAM_CLONE_PATH};

        for (size_t i = 0; i < sizeof(paths) / sizeof(*paths); i++) {
                const struct bs_slice *path = &event->attributes[paths[i]];

                if (path->data && !path_is_sound(path))
                        return refuse(stream, "a path that cannot be");
        }
        /* The target of a symbolic link is anything. */
        if (target->data && event->command == BS_STREAM_LINK && !path_is_sound(target))
                return refuse(stream, "a path that cannot be");
        if (name->data &&
            (name->length == 0 || name->length > NAME_MAX_BYTES || memchr(name->data, 0, name->length)))
                return refuse(stream, "an extended attribute's name that cannot be");
        return 0;
}

/* Set the range of an event that changes data. */
static int set_range(const struct bs_stream *stream, struct bs_stream_event *event)
{
        uint64_t end;

        switch (event->command) {
        case BS_STREAM_TRUNCATE:
                /* Its "offset" is the new size. */
                event->offset = bs_stream_number(event, BS_STREAM_SIZE);
                break;
        case BS_STREAM_WRITE:
                event->offset = bs_stream_number(event, BS_STREAM_FILE_OFFSET);
                event->length = event->attributes[BS_STREAM_DATA].length;
                break;
        case BS_STREAM_ENCODED_WRITE:
                event->offset = bs_stream_number(event, BS_STREAM_FILE_OFFSET);
                event->length = bs_stream_number(event, BS_STREAM_UNENCODED_FILE_LEN);
                break;
        case BS_STREAM_CLONE:
                event->offset = bs_stream_number(event, BS_STREAM_FILE_OFFSET);
                event->length = bs_stream_number(event, BS_STREAM_CLONE_LEN);
                break;
        case BS_STREAM_UPDATE_EXTENT:
        case BS_STREAM_FALLOCATE:
                event->offset = bs_stream_number(event, BS_STREAM_FILE_OFFSET);
                event->length = bs_stream_number(event, BS_STREAM_SIZE);
                break;
        default:
                return 0;
        }
        if (__builtin_add_overflow(event->offset, event->length, &end) || end > INT64_MAX)
                return refuse(stream, "a range beyond what a file can hold");
        return 0;
}

static int parse(const struct bs_stream *stream, const uint8_t *command, size_t length,
                 struct bs_stream_event *out)
{
        struct bs_slice left = {command + COMMAND_HEADER_SIZE, length - COMMAND_HEADER_SIZE};
        unsigned number = bs_le16(command + 4);
        uint32_t present = 0;

        if (number == 0 || number >= BS_STREAM_COMMANDS || rules[number].since > stream->version)
                return refuse(stream, "an unknown command");
        *out = (struct bs_stream_event){.command = number, .position = stream->position};
        while (left.length > 0) {
                int result = next_attribute(stream, &left, out);

                if (result < 0)
                        return result;
        }
        for (unsigned i = 0; i < BS_STREAM_ATTRIBUTES; i++)
                present |= (uint32_t)(out->attributes[i].data ? 1 : 0) << i;
        if ((present & rules[number].required) != rules[number].required)
                return refuse(stream, "a command without an attribute that it needs");
        if (present & ~(rules[number].required | rules[number].optional))
                return refuse(stream, "a command with an attribute that it cannot have");

        int result = check_names(stream, out);

        return result < 0 ? result : set_range(stream, out);
}

static int take_command(struct bs_stream *stream, const uint8_t *command, size_t length)
{
        static const uint8_t no_crc[4];
        struct bs_stream_event event;
        uint32_t crc = bs_crc32c(0, command, CRC_OFFSET);

        crc = bs_crc32c(crc, no_crc, sizeof(no_crc));
        crc = bs_crc32c(crc, command + COMMAND_HEADER_SIZE, length - COMMAND_HEADER_SIZE);
        if (crc != bs_le32(command + CRC_OFFSET))
                return refuse(stream, "a command's checksum is wrong");

        int result = parse(stream, command, length, &event);

        if (result < 0)
                return result;
        if ((stream->commands == 0) !=
            (event.command == BS_STREAM_SUBVOL || event.command == BS_STREAM_SNAPSHOT))
                return refuse(stream, "the snapshot has to be named first, and once");
        stream->commands++;
        if (event.command == BS_STREAM_END) {
                stream->ended = true;
                return 0;
        }
        return stream->take(stream->context, &event);
}

static int take_header(struct bs_stream *stream, const uint8_t *header)
{
        if (memcmp(header, MAGIC, sizeof(MAGIC)) != 0)
                return refuse(stream, "it does not begin like a send stream");
        stream->version = bs_le32(header + sizeof(MAGIC));
        if (stream->version < 1 || stream->version > 2)
                return refuse(stream, "a version that is not known");
        return 0;
}

/* How many bytes the unit at `data` has: the header of the stream, that of a command, or all of a command. */
static int unit_size(const struct bs_stream *stream, const uint8_t *data, size_t length, size_t *out)
{
        size_t limit = stream->version == 1 ? COMMAND_MAX_V1 : COMMAND_MAX_V2;

        *out = stream->version == 0 ? HEADER_SIZE : COMMAND_HEADER_SIZE;
        if (stream->version == 0 || length < COMMAND_HEADER_SIZE)
                return 0;
        if (bs_le32(data) > limit - COMMAND_HEADER_SIZE)
                return refuse(stream, "a command is too long");
        *out += bs_le32(data);
        return 0;
}

/* Take the unit at `data` if all of it is there: `*taken` is its size, or 0. */
static int take_unit(struct bs_stream *stream, const uint8_t *data, size_t length, size_t *taken)
{
        size_t size;
        int result = unit_size(stream, data, length, &size);

        *taken = 0;
        if (result < 0 || length < size)
                return result;
        result = stream->version == 0 ? take_header(stream, data) : take_command(stream, data, size);
        stream->position += size;
        *taken = size;
        return result;
}

/* Take what is missing of the unit that was begun, or of its head, and no more. */
static int complete_pending(struct bs_stream *stream, const uint8_t *data, size_t length, size_t *taken)
{
        size_t size;
        size_t used;
        int result = unit_size(stream, stream->pending, stream->held, &size);

        if (result < 0)
                return result;
        *taken = size - stream->held < length ? size - stream->held : length;
        memcpy(stream->pending + stream->held, data, *taken);
        stream->held += *taken;
        result = take_unit(stream, stream->pending, stream->held, &used);
        if (used > 0)
                stream->held = 0;
        return result;
}

/* Take a unit where it is, or keep the part of one with which the data ends. */
static int take_in_place(struct bs_stream *stream, const uint8_t *data, size_t length, size_t *taken)
{
        int result = take_unit(stream, data, length, taken);

        if (result < 0 || *taken > 0)
                return result;
        memcpy(stream->pending, data, length);
        stream->held = *taken = length;
        return 0;
}

int bs_stream_init(struct bs_stream *stream, bs_stream_fn take, void *context, struct bs_error *error)
{
        *stream = (struct bs_stream){.take = take, .context = context, .error = error};
        stream->pending = bs_realloc(NULL, COMMAND_MAX_V2, 1);
        return stream->pending ? 0 : -ENOMEM;
}

void bs_stream_deinit(struct bs_stream *stream)
{
        bs_free(stream->pending);
        stream->pending = NULL;
}

int bs_stream_push(struct bs_stream *stream, const void *data, size_t length)
{
        const uint8_t *from = data;
        int result = 0;

        while (length > 0 && result == 0) {
                size_t taken = 0;

                if (stream->ended)
                        return refuse(stream, "something follows the end");
                result = stream->held > 0 ? complete_pending(stream, from, length, &taken)
                                          : take_in_place(stream, from, length, &taken);
                from += taken;
                length -= taken;
        }
        return result;
}

int bs_stream_finish(struct bs_stream *stream)
{
        return stream->ended ? 0 : refuse(stream, "the stream ends early");
}
