/* SPDX-License-Identifier: Apache-2.0 */
/* Send streams for tests, written command by command, right or wrong. */
#ifndef BLOCKSNAP_SEND_IMAGE_H
#define BLOCKSNAP_SEND_IMAGE_H

#include "btrfs_stream.h"

enum { SEND_IMAGE_MAX = 1 << 20, SEND_HEADER_SIZE = 17, SEND_COMMAND_HEADER_SIZE = 10 };

struct send_image {
        uint8_t bytes[SEND_IMAGE_MAX];
        size_t length;
        size_t command; /* where the last one begins */
};

/* A stream of only a header. */
struct send_image *send_image_create(uint32_t version);
void send_image_destroy(struct send_image *image);

/* Begin a command, add attributes, and write its length and checksum. */
void send_begin(struct send_image *image, unsigned command);
void send_bytes(struct send_image *image, unsigned attribute, const void *data, size_t length);
void send_text(struct send_image *image, unsigned attribute, const char *text);
void send_number(struct send_image *image, unsigned attribute, uint64_t value, size_t size);
void send_raw(struct send_image *image, const void *data, size_t length);
void send_seal(struct send_image *image);

/* Whole commands, sealed. */
void send_snapshot(struct send_image *image);
void send_path(struct send_image *image, unsigned command, const char *path);
void send_two_paths(struct send_image *image, unsigned command, const char *path, unsigned attribute,
                    const char *other);
void send_create(struct send_image *image, unsigned command, const char *path, uint64_t inode);
void send_extent(struct send_image *image, const char *path, uint64_t offset, uint64_t length);
void send_punch(struct send_image *image, const char *path, uint64_t offset, uint64_t length);
void send_truncate(struct send_image *image, const char *path, uint64_t size);
void send_times(struct send_image *image, const char *path);
void send_end(struct send_image *image);

/* One of each command that the version has, with all attributes, from SNAPSHOT to END. */
struct send_image *send_image_of_everything(uint32_t version);

#endif
