/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_listing.h"

#include <string.h>

enum { LARGEST_KIND = 7, LONGEST_NAME = 255 };

static int parse_name(const struct bs_btrfs_item *item, struct bs_error *error, struct bs_btrfs_name *out)
{
        struct bs_btrfs_entry entry;
        uint32_t at = 0;
        int result = bs_btrfs_entry_parse(item, error, &at, &entry);

        if (result < 0)
                return result;
        /* Indexes begin at 2: 0 and 1 are those of . and .., which have no items. */
        if (at != item->length || item->key.offset == 0 || entry.name_length == 0 ||
            entry.name_length > LONGEST_NAME || entry.type > LARGEST_KIND)
                return bs_fail_block(error, item->key.objectid, "a directory entry that cannot be");
        if (entry.location.type != BS_BTRFS_INODE_ITEM && entry.location.type != BS_BTRFS_ROOT_ITEM)
                return bs_fail_block(error, item->key.objectid, "a name that leads to no inode");
        *out = (struct bs_btrfs_name){
                .index = item->key.offset,
                .inode = entry.location.objectid,
                .name = entry.name,
                .length = entry.name_length,
                .kind = entry.location.type == BS_BTRFS_ROOT_ITEM ? BS_BTRFS_SUBVOLUME : entry.type,
        };
        return 0;
}

static int next_in_tree(void *context, struct bs_btrfs_name *out)
{
        struct bs_btrfs_tree_names *names = context;
        const struct bs_btrfs_item *item;
        int result;

        if (names->began)
                bs_btrfs_advance(names->cursor);
        names->began = false;
        out->length = 0;
        result = bs_btrfs_peek(names->cursor, &item);
        if (result < 0)
                return result;
        if (!item || item->key.objectid != names->inode || item->key.type != BS_BTRFS_DIR_INDEX)
                return 0;
        names->began = true;
        return parse_name(item, names->cursor->error, out);
}

struct bs_btrfs_name_source bs_btrfs_tree_names(struct bs_btrfs_tree_names *names)
{
        return (struct bs_btrfs_name_source){.next = next_in_tree, .context = names};
}

static int refuse(struct bs_btrfs_state_names *names)
{
        return bs_fail_block(names->error, names->inode, "what was remembered of a directory makes no sense");
}

int bs_btrfs_state_names_init(const struct bs_span *state, uint64_t inode, struct bs_error *error,
                              struct bs_btrfs_state_names *out)
{
        *out = (struct bs_btrfs_state_names){.span = *state, .error = error, .inode = inode};
        return state->left == 0 || bs_btrfs_listing_open(&out->span) ? 0 : refuse(out);
}

static int next_in_state(void *context, struct bs_btrfs_name *out)
{
        struct bs_btrfs_state_names *names = context;

        if (!bs_btrfs_listing_take(&names->span, &names->name))
                return refuse(names);
        *out = names->name;
        return 0;
}

struct bs_btrfs_name_source bs_btrfs_state_names(struct bs_btrfs_state_names *names)
{
        return (struct bs_btrfs_name_source){.next = next_in_state, .context = names};
}

static void write_name(struct bs_bytes *to, const struct bs_btrfs_name *name)
{
        bs_bytes_add_number(to, name->index, 8);
        bs_bytes_add_number(to, name->inode, 8);
        bs_bytes_add_number(to, name->kind, 1);
        bs_bytes_add_number(to, name->length, 1);
        bs_bytes_add(to, name->name, name->length);
}

static bool is_same(const struct bs_btrfs_name *old, const struct bs_btrfs_name *present)
{
        return old->inode == present->inode && old->kind == present->kind && old->length == present->length &&
               memcmp(old->name, present->name, old->length) == 0;
}

int bs_btrfs_compare_names(struct bs_btrfs_name_source old, struct bs_btrfs_name_source present,
                           struct bs_bytes *added, struct bs_bytes *removed, struct bs_bytes *remember)
{
        struct bs_btrfs_name before = {.length = 0};
        struct bs_btrfs_name last = {.length = 0};
        struct bs_btrfs_name now = {.length = 0};
        int result = old.next(old.context, &before);

        if (remember)
                bs_btrfs_listing_begin(remember);
        if (result == 0)
                result = present.next(present.context, &now);
        while (result == 0 && (before.length || now.length)) {
                bool take_old = before.length && (!now.length || before.index <= now.index);
                bool take_present = now.length && (!before.length || now.index <= before.index);

                if (!take_old || !take_present || !is_same(&before, &now)) {
                        if (take_old)
                                write_name(removed, &before);
                        if (take_present)
                                write_name(added, &now);
                }
                if (take_present) {
                        if (remember)
                                bs_btrfs_listing_add(remember, &last, &now);
                        last = now;
                        result = present.next(present.context, &now);
                }
                if (result == 0 && take_old)
                        result = old.next(old.context, &before);
        }
        return result;
}
