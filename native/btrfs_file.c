/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_diff.h"

#include "cleanup.h"

#include <sys/stat.h>

enum { FILE_BUFFER = 1 << 18 };

void bs_btrfs_file_diff_deinit(struct bs_btrfs_file_diff *diff)
{
        bs_extents_deinit(&diff->changed);
        bs_extents_deinit(&diff->holes);
        bs_bytes_deinit(&diff->state);
}

/* Bring a cursor to the extents of a file. */
static int open_file(struct bs_btrfs_cursor *cursor, const struct bs_btrfs_file *file,
                     struct bs_btrfs_inode *out)
{
        const struct bs_btrfs_range items = {
                .first = {.objectid = file->inode, .type = BS_BTRFS_INODE_ITEM},
                .last = {.objectid = file->inode, .type = BS_BTRFS_EXTENT_DATA, .offset = UINT64_MAX},
        };
        const struct bs_btrfs_key extents = {.objectid = file->inode, .type = BS_BTRFS_EXTENT_DATA};
        const struct bs_btrfs_item *item;
        int result;

        bs_btrfs_seek(cursor, &items);
        result = bs_btrfs_peek(cursor, &item);
        if (result < 0)
                return result;
        if (!item || item->key.type != BS_BTRFS_INODE_ITEM)
                return bs_fail_call(cursor->error, file->tree->call, -ENOENT);
        result = bs_btrfs_inode_parse(item, cursor->error, out);
        if (result < 0)
                return result;
        if (!S_ISREG(out->mode))
                return bs_fail_range(cursor->error, "an inode is no regular file");
        bs_btrfs_advance(cursor);
        return bs_btrfs_forward(cursor, &extents);
}

int bs_btrfs_diff_file(const struct bs_btrfs_file *old, const struct bs_btrfs_file *present, uint32_t block,
                       const struct bs_interrupt *interrupt, struct bs_error *error,
                       struct bs_btrfs_file_diff *out)
{
        _cleanup_(bs_btrfs_cursor_deinit) struct bs_btrfs_cursor before = {.buffer = NULL};
        _cleanup_(bs_btrfs_cursor_deinit) struct bs_btrfs_cursor now = {.buffer = NULL};
        struct bs_btrfs_inode old_inode;
        struct bs_btrfs_inode inode;
        struct bs_btrfs_tree_extents old_extents;
        struct bs_btrfs_tree_extents extents;
        int result = bs_btrfs_cursor_init(old->tree, interrupt, error, FILE_BUFFER, &before);

        *out = (struct bs_btrfs_file_diff){.size = 0};
        if (result == 0)
                result = bs_btrfs_cursor_init(present->tree, interrupt, error, FILE_BUFFER, &now);
        if (result == 0)
                result = open_file(&before, old, &old_inode);
        if (result == 0)
                result = open_file(&now, present, &inode);
        if (result < 0)
                return result;
        bs_btrfs_tree_extents_init(&before, old->inode, block, NULL, &old_extents);
        bs_btrfs_tree_extents_init(&now, present->inode, block, &out->state, &extents);

        struct bs_btrfs_compare compare = {
                .old = bs_btrfs_tree_source(&old_extents),
                .present = bs_btrfs_tree_source(&extents),
                .old_size = old_inode.size,
                .size = inode.size,
                .block = block,
        };

        out->size = inode.size;
        result = bs_btrfs_compare_extents(&compare, &out->changed, &out->holes);
        if (result < 0)
                return result;
        if (bs_btrfs_adds_up(&old_extents, &old_inode) && bs_btrfs_adds_up(&extents, &inode))
                return bs_bytes_status(&out->state);
        out->changed.count = out->holes.count = 0;
        bs_bytes_clear(&out->state);
        return bs_extents_append(&out->changed, 0, inode.size);
}
