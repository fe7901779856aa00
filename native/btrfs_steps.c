/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_steps.h"

#include "memory.h"

#include <linux/falloc.h>
#include <string.h>

/* Make room for `more` items of `size` bytes behind `count`. */
static int reserve(void **items, size_t *capacity, size_t count, size_t more, size_t size)
{
        size_t needed;

        if (__builtin_add_overflow(count, more, &needed))
                return -ENOMEM;
        if (needed <= *capacity)
                return 0;

        size_t wanted = *capacity < 32 ? 64 : *capacity + *capacity / 2;

        if (wanted < needed)
                wanted = needed;

        void *grown = bs_realloc(*items, wanted, size);

        if (!grown)
                return -ENOMEM;
        *items = grown;
        *capacity = wanted;
        return 0;
}

static bool same_text(const struct bs_steps *steps, const struct bs_text *text, const struct bs_slice *slice)
{
        return text->length == slice->length &&
               (text->length == 0 || memcmp(steps->text + text->offset, slice->data, text->length) == 0);
}

static int add_text(struct bs_steps *steps, const struct bs_slice *slice, struct bs_text *out)
{
        void *text = steps->text;
        int result = reserve(&text, &steps->text_capacity, steps->text_length, slice->length, 1);

        steps->text = text;
        if (result < 0)
                return result;
        *out = (struct bs_text){steps->text_length, slice->length};
        if (slice->length > 0)
                memcpy(steps->text + steps->text_length, slice->data, slice->length);
        steps->text_length += slice->length;
        return 0;
}

static const struct bs_step *last_step(const struct bs_steps *steps)
{
        return steps->count > 0 ? &steps->items[steps->count - 1] : NULL;
}

static int add_step(struct bs_steps *steps, enum bs_step_kind kind, const struct bs_slice *path,
                    const struct bs_slice *other, uint64_t number)
{
        struct bs_step step = {.kind = kind, .number = number, .first_range = steps->range_count};
        void *items = steps->items;
        int result = reserve(&items, &steps->capacity, steps->count, 1, sizeof(*steps->items));

        steps->items = items;
        if (result < 0)
                return result;

        const struct bs_step *last = last_step(steps);

        if (last && same_text(steps, &last->path, path))
                step.path = last->path;
        else
                result = add_text(steps, path, &step.path);
        if (result == 0 && other)
                result = add_text(steps, other, &step.other);
        if (result == 0)
                steps->items[steps->count++] = step;
        return result;
}

/* Whether the last step is already of this kind and path. */
static bool continues(const struct bs_steps *steps, enum bs_step_kind kind, const struct bs_slice *path)
{
        const struct bs_step *last = last_step(steps);

        return last && last->kind == kind && same_text(steps, &last->path, path);
}

static int add_range(struct bs_steps *steps, enum bs_step_kind kind, const struct bs_stream_event *event)
{
        const struct bs_slice *path = &event->attributes[BS_STREAM_PATH];
        void *ranges = steps->ranges;
        int result = 0;

        if (!continues(steps, kind, path))
                result = add_step(steps, kind, path, NULL, 0);
        if (result < 0)
                return result;

        struct bs_step *step = &steps->items[steps->count - 1];
        struct bs_extent *last =
                step->range_count > 0 ? &steps->ranges[step->first_range + step->range_count - 1] : NULL;

        if (last && last->offset + last->length == event->offset) {
                last->length += event->length;
                return 0;
        }
        result = reserve(&ranges, &steps->range_capacity, steps->range_count, 1, sizeof(*steps->ranges));
        steps->ranges = ranges;
        if (result < 0)
                return result;
        steps->ranges[steps->range_count++] = (struct bs_extent){event->offset, event->length};
        step->range_count++;
        return 0;
}

static int touch(struct bs_steps *steps, const struct bs_slice *path)
{
        const struct bs_step *last = last_step(steps);
        /* A file whose data changed is touched as it is; one that was renamed has another path now. */
        bool known = last && last->kind != BS_STEP_RENAME && last->kind != BS_STEP_REMOVE &&
                     same_text(steps, &last->path, path);

        return known ? 0 : add_step(steps, BS_STEP_TOUCH, path, NULL, 0);
}

int bs_steps_take(void *context, const struct bs_stream_event *event)
{
        struct bs_steps *steps = context;
        const struct bs_slice *path = &event->attributes[BS_STREAM_PATH];

        switch (event->command) {
        case BS_STREAM_SUBVOL:
        case BS_STREAM_SNAPSHOT:
        case BS_STREAM_END:
                return 0;
        case BS_STREAM_MKDIR:
                return add_step(steps, BS_STEP_CREATE_DIRECTORY, path, NULL,
                                bs_stream_number(event, BS_STREAM_INO));
        case BS_STREAM_MKFILE:
        case BS_STREAM_MKNOD:
        case BS_STREAM_MKFIFO:
        case BS_STREAM_MKSOCK:
        case BS_STREAM_SYMLINK:
                return add_step(steps, BS_STEP_CREATE, path, NULL, bs_stream_number(event, BS_STREAM_INO));
        case BS_STREAM_RENAME:
                return add_step(steps, BS_STEP_RENAME, path, &event->attributes[BS_STREAM_PATH_TO], 0);
        case BS_STREAM_LINK:
                return add_step(steps, BS_STEP_LINK, path, &event->attributes[BS_STREAM_PATH_LINK], 0);
        case BS_STREAM_UNLINK:
        case BS_STREAM_RMDIR:
                return add_step(steps, BS_STEP_REMOVE, path, NULL, 0);
        case BS_STREAM_WRITE:
        case BS_STREAM_CLONE:
        case BS_STREAM_UPDATE_EXTENT:
        case BS_STREAM_ENCODED_WRITE:
                return add_range(steps, BS_STEP_DATA, event);
        case BS_STREAM_FALLOCATE:
                return add_range(steps,
                                 bs_stream_number(event, BS_STREAM_FALLOCATE_MODE) & FALLOC_FL_PUNCH_HOLE
                                         ? BS_STEP_HOLE
                                         : BS_STEP_DATA,
                                 event);
        case BS_STREAM_TRUNCATE:
                return add_step(steps, BS_STEP_RESIZE, path, NULL, event->offset);
        case BS_STREAM_CHMOD:
        case BS_STREAM_CHOWN:
        case BS_STREAM_UTIMES:
        case BS_STREAM_FILEATTR:
        case BS_STREAM_SET_XATTR:
        case BS_STREAM_REMOVE_XATTR:
                return touch(steps, path);
        case BS_STREAM_COMMANDS:
                break;
        }
        return -EINVAL;
}

void bs_steps_init(struct bs_steps *steps)
{
        *steps = (struct bs_steps){.count = 0};
}

void bs_steps_deinit(struct bs_steps *steps)
{
        bs_free(steps->items);
        bs_free(steps->ranges);
        bs_free(steps->text);
        bs_steps_init(steps);
}
