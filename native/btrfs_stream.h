/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stream of BTRFS_IOC_SEND, versions 1 and 2 (fs/btrfs/send.h of the kernel), read as it arrives.
 *
 *     magic "btrfs-stream\0", u32 version, then commands: u32 length, u16 command, u32 crc, attributes
 *     attribute: u16 type, u16 length, data; in version 2 that of the data is the last and has no length
 *
 * All little-endian. The length is that of the attributes; the checksum is CRC-32C from 0 without inversion,
 * over the command with the checksum taken as 0. The stream of one snapshot begins with SUBVOL or SNAPSHOT
 * and ends with END.
 *
 * Nothing of it is believed: lengths, checksums, paths, which attributes a command has and which it must
 * have. Whatever is not known is an error, as it may mean a change that would be missed. Memory is one
 * command: 192 KiB.
 */
#ifndef BLOCKSNAP_BTRFS_STREAM_H
#define BLOCKSNAP_BTRFS_STREAM_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum bs_stream_command {
        BS_STREAM_SUBVOL = 1,
        BS_STREAM_SNAPSHOT,
        BS_STREAM_MKFILE,
        BS_STREAM_MKDIR,
        BS_STREAM_MKNOD,
        BS_STREAM_MKFIFO,
        BS_STREAM_MKSOCK,
        BS_STREAM_SYMLINK,
        BS_STREAM_RENAME,
        BS_STREAM_LINK,
        BS_STREAM_UNLINK,
        BS_STREAM_RMDIR,
        BS_STREAM_SET_XATTR,
        BS_STREAM_REMOVE_XATTR,
        BS_STREAM_WRITE,
        BS_STREAM_CLONE,
        BS_STREAM_TRUNCATE,
        BS_STREAM_CHMOD,
        BS_STREAM_CHOWN,
        BS_STREAM_UTIMES,
        BS_STREAM_END,
        BS_STREAM_UPDATE_EXTENT,
        /* Version 2. */
        BS_STREAM_FALLOCATE,
        BS_STREAM_FILEATTR,
        BS_STREAM_ENCODED_WRITE,
        BS_STREAM_COMMANDS,
};

enum bs_stream_attribute {
        BS_STREAM_UUID = 1,
        BS_STREAM_CTRANSID,
        BS_STREAM_INO,
        BS_STREAM_SIZE,
        BS_STREAM_MODE,
        BS_STREAM_UID,
        BS_STREAM_GID,
        BS_STREAM_RDEV,
        BS_STREAM_CTIME,
        BS_STREAM_MTIME,
        BS_STREAM_ATIME,
        BS_STREAM_OTIME,
        BS_STREAM_XATTR_NAME,
        BS_STREAM_XATTR_DATA,
        BS_STREAM_PATH,
        BS_STREAM_PATH_TO,
        BS_STREAM_PATH_LINK,
        BS_STREAM_FILE_OFFSET,
        BS_STREAM_DATA,
        BS_STREAM_CLONE_UUID,
        BS_STREAM_CLONE_CTRANSID,
        BS_STREAM_CLONE_PATH,
        BS_STREAM_CLONE_OFFSET,
        BS_STREAM_CLONE_LEN,
        /* Version 2. */
        BS_STREAM_FALLOCATE_MODE,
        BS_STREAM_FILE_FLAGS, /* the kernel's FILEATTR */
        BS_STREAM_UNENCODED_FILE_LEN,
        BS_STREAM_UNENCODED_LEN,
        BS_STREAM_UNENCODED_OFFSET,
        BS_STREAM_COMPRESSION,
        BS_STREAM_ENCRYPTION,
        BS_STREAM_ATTRIBUTES,
};

/* Bytes that belong to somebody else. */
struct bs_slice {
        const uint8_t *data; /* NULL: there are none, which is not the same as an empty string */
        size_t length;
};

/*
 * One command. Of what it touches, `path` is where it is at this point of the stream: the receiver of a
 * stream makes new inodes under temporary names and renames them, and directories as well.
 * For what changes data, [offset, offset + length) are the bytes, and below 2^63.
 */
struct bs_stream_event {
        enum bs_stream_command command;
        uint64_t position; /* of the command in the stream, in bytes */
        uint64_t offset;
        uint64_t length;
        struct bs_slice attributes[BS_STREAM_ATTRIBUTES];
};

/* The number in an attribute of 4 or 8 bytes that the command must have. */
uint64_t bs_stream_number(const struct bs_stream_event *event, enum bs_stream_attribute attribute);

/* Called for every command but END. What the event points to is gone after the call. Not 0: stop with it. */
typedef int (*bs_stream_fn)(void *context, const struct bs_stream_event *event);

struct bs_stream {
        bs_stream_fn take;
        void *context;
        struct bs_error *error; /* `block` is the position in the stream, in bytes */
        uint32_t version;       /* 0 until the header has been read */
        uint64_t position;      /* of what is in `pending` */
        uint64_t commands;
        bool ended;
        uint8_t *pending; /* the part that has arrived of a header or command */
        size_t held;
};

/* Begin a stream; release it with bs_stream_deinit(), whatever is returned. */
int bs_stream_init(struct bs_stream *stream, bs_stream_fn take, void *context, struct bs_error *error);
void bs_stream_deinit(struct bs_stream *stream);

/*
 * Take the next bytes of the stream, however it is cut. -EUCLEAN when it makes no sense; then, as after what
 * `take` returns, the stream is of no further use.
 */
int bs_stream_push(struct bs_stream *stream, const void *data, size_t length);

/* Tell that there is no more: -EUCLEAN unless the stream was complete. */
int bs_stream_finish(struct bs_stream *stream);

#endif
