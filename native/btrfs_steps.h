/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a send stream does to the parent's tree, in as few steps as tell which inodes it touches and where.
 *
 * Paths are those of the moment, so the steps have to be followed in their order. Attributes and extended
 * attributes are not kept: that an inode was touched is enough, as all of it is then read from the snapshot.
 * Memory is some 60 bytes a step, its paths, and 16 bytes a range; what follows on the same path is one step.
 */
#ifndef BLOCKSNAP_BTRFS_STEPS_H
#define BLOCKSNAP_BTRFS_STEPS_H

#include "btrfs_stream.h"
#include "extent.h"

enum bs_step_kind {
        BS_STEP_CREATE,           /* anything but a directory; `number` is the inode */
        BS_STEP_CREATE_DIRECTORY, /* the same for one */
        BS_STEP_RENAME,           /* `path` becomes `other` */
        BS_STEP_LINK,             /* `path` is a new name of `other` */
        BS_STEP_REMOVE,           /* a name, or an empty directory */
        BS_STEP_DATA,             /* `ranges` may have other bytes */
        BS_STEP_HOLE,             /* `ranges` read as zeros */
        BS_STEP_RESIZE,           /* to `number` bytes; what was behind is gone */
        BS_STEP_TOUCH,            /* attributes or extended attributes */
        BS_STEP_KINDS,
};

/* A part of bs_steps.text. */
struct bs_text {
        size_t offset;
        size_t length;
};

struct bs_step {
        enum bs_step_kind kind;
        struct bs_text path;
        struct bs_text other;
        uint64_t number;
        size_t first_range; /* in bs_steps.ranges */
        size_t range_count; /* as they came: in no order */
};

struct bs_steps {
        struct bs_step *items;
        size_t count;
        size_t capacity;
        struct bs_extent *ranges;
        size_t range_count;
        size_t range_capacity;
        uint8_t *text;
        size_t text_length;
        size_t text_capacity;
};

void bs_steps_init(struct bs_steps *steps);
void bs_steps_deinit(struct bs_steps *steps);

/* A bs_stream_fn; the context is a struct bs_steps. -ENOMEM. */
int bs_steps_take(void *context, const struct bs_stream_event *event);

#endif
