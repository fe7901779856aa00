/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_diff.h"

#include "btrfs_listing.h"
#include "cleanup.h"

#include <endian.h>
#include <string.h>
#include <sys/stat.h>

enum {
        SWEEP_BUFFER = 1 << 18,
        INODE_BUFFER = 1 << 16,
        /* Up to so many untouched inodes are read along, which is cheaper than a search of its own. */
        LARGEST_GAP = 8,
        /* Of an inode in memory: number, generation, size, length of the state. */
        MEMORY_SIZE = 32,
};

void bs_btrfs_touched_deinit(struct bs_btrfs_touched *touched)
{
        bs_bytes_deinit(&touched->numbers);
        bs_bytes_deinit(&touched->transactions);
        bs_bytes_deinit(&touched->modes);
}

/*
 * A snapshot is made while its transaction commits and nobody writes any more. All that this transaction does
 * to the source afterwards is to give names to snapshots, when they are kept in directories of the source
 * itself.
 */
static bool is_later(const struct bs_btrfs_inode *inode, uint64_t since)
{
        return inode->transid > since || since == 0 || (inode->transid == since && S_ISDIR(inode->mode));
}

static int note_touched(const struct bs_btrfs_item *item, uint64_t since, struct bs_error *error,
                        struct bs_btrfs_touched *out)
{
        struct bs_btrfs_inode inode;
        int result = bs_btrfs_inode_parse(item, error, &inode);

        /* One without a name was open when the snapshot was taken, and is about to vanish from it. */
        if (result < 0 || inode.nlink == 0 || !is_later(&inode, since))
                return result;
        bs_bytes_add_number(&out->numbers, item->key.objectid, 8);
        bs_bytes_add_number(&out->transactions, inode.transid, 8);
        bs_bytes_add_number(&out->modes, inode.mode, 4);
        result = bs_bytes_status(&out->numbers);
        if (result == 0)
                result = bs_bytes_status(&out->transactions);
        return result == 0 ? bs_bytes_status(&out->modes) : result;
}

int bs_btrfs_touched(const struct bs_btrfs_source *tree, uint64_t since, const struct bs_interrupt *interrupt,
                     struct bs_error *error, struct bs_btrfs_touched *out)
{
        const struct bs_btrfs_range all = {
                .first = {.objectid = BS_BTRFS_FIRST_INODE},
                .last = {.objectid = BS_BTRFS_LAST_INODE, .offset = UINT64_MAX, .type = UINT8_MAX},
                .min_transid = since,
        };
        _cleanup_(bs_btrfs_cursor_deinit) struct bs_btrfs_cursor cursor;
        const struct bs_btrfs_item *item;
        int result = bs_btrfs_cursor_init(tree, interrupt, error, SWEEP_BUFFER, &cursor);

        *out = (struct bs_btrfs_touched){.items = 0};
        if (result < 0)
                return result;
        bs_btrfs_seek(&cursor, &all);
        for (;;) {
                result = bs_btrfs_peek(&cursor, &item);
                if (result < 0 || !item)
                        return result;
                out->items++;
                if (item->key.type == BS_BTRFS_INODE_ITEM)
                        result = note_touched(item, since, error, out);
                if (result < 0)
                        return result;
                bs_btrfs_advance(&cursor);
        }
}

/* What is known of an inode as it was. */
struct old {
        bool exists;
        bool in_tree; /* the base's cursor is behind its INODE_ITEM; else `state` is what there is */
        bool is_directory;
        bool has_state;
        struct bs_span state;
        struct bs_btrfs_inode inode;
};

/* The parts of a record, in their order. */
enum { CHANGED, HOLES, ADDED, REMOVED, LINKS, XATTRS, TARGET, STATE, PARTS };

struct walk {
        const struct bs_btrfs_diff *diff;
        struct bs_error *error;
        struct bs_btrfs_cursor tree;
        struct bs_btrfs_cursor base;
        size_t at; /* in diff->numbers */
        struct bs_span memory;
        uint64_t remembered; /* number of the inode at the front of `memory`; 0: none is left */
        struct bs_extents changed;
        struct bs_extents holes;
        struct bs_bytes parts[PARTS];
        struct bs_bytes *out;
};

static void walk_deinit(struct walk *walk)
{
        bs_btrfs_cursor_deinit(&walk->tree);
        bs_btrfs_cursor_deinit(&walk->base);
        bs_extents_deinit(&walk->changed);
        bs_extents_deinit(&walk->holes);
        for (size_t i = 0; i < PARTS; i++)
                bs_bytes_deinit(&walk->parts[i]);
}

static uint64_t number_at(const struct bs_btrfs_diff *diff, size_t index)
{
        uint64_t number;

        memcpy(&number, diff->numbers + 8 * index, sizeof(number));
        return le64toh(number);
}

/* Bring a cursor to the first item of the inode that is compared now, or to what is in its place. */
static int enter(struct walk *walk, struct bs_btrfs_cursor *cursor, uint64_t number)
{
        const struct bs_btrfs_diff *diff = walk->diff;
        struct bs_btrfs_range run = {
                .first = {.objectid = number},
                .last = {.objectid = number, .offset = UINT64_MAX, .type = UINT8_MAX},
        };

        if (number <= cursor->range.last.objectid)
                return bs_btrfs_forward(cursor, &run.first);
        for (size_t next = walk->at + 1; next < diff->count; next++) {
                uint64_t following = number_at(diff, next);

                if (following - run.last.objectid > LARGEST_GAP)
                        break;
                run.last.objectid = following;
        }
        bs_btrfs_seek(cursor, &run);
        return 0;
}

/* Take the INODE_ITEM the cursor is at; `*found` is false when it is at another item, or at one without a
 * name. */
static int take_inode(struct bs_btrfs_cursor *cursor, uint64_t number, struct bs_btrfs_inode *out,
                      bool *found)
{
        const struct bs_btrfs_item *item;
        int result = bs_btrfs_peek(cursor, &item);

        *found = result == 0 && item && item->key.objectid == number && item->key.type == BS_BTRFS_INODE_ITEM;
        if (!*found)
                return result;
        result = bs_btrfs_inode_parse(item, cursor->error, out);
        bs_btrfs_advance(cursor);
        *found = out->nlink > 0;
        return result;
}

static int refuse_memory(struct walk *walk, uint64_t number)
{
        return bs_fail_block(walk->error, number, "what was remembered makes no sense");
}

static uint64_t memory_u64(const uint8_t *head, size_t index)
{
        uint64_t value;

        memcpy(&value, head + 8 * index, sizeof(value));
        return le64toh(value);
}

/* Find an inode in memory; entries before it are of inodes that nobody asks for, and are left behind. */
static int recall(struct walk *walk, uint64_t number, struct old *out)
{
        while (walk->memory.left > 0) {
                const uint8_t *head = walk->memory.data;
                uint64_t length;

                if (walk->memory.left < MEMORY_SIZE || memory_u64(head, 0) <= walk->remembered)
                        return refuse_memory(walk, number);
                if (memory_u64(head, 0) > number)
                        break;
                bs_span_take(&walk->memory, MEMORY_SIZE);
                walk->remembered = memory_u64(head, 0);
                length = memory_u64(head, 3);
                out->has_state = length != BS_BTRFS_NO_STATE;
                out->state.left = out->has_state ? (size_t)length : 0;
                out->state.data = bs_span_take(&walk->memory, out->state.left);
                if (!out->state.data || memory_u64(head, 2) > INT64_MAX)
                        return refuse_memory(walk, number);
                out->inode = (struct bs_btrfs_inode){
                        .generation = memory_u64(head, 1),
                        .size = memory_u64(head, 2),
                };
                out->exists = walk->remembered == number;
        }
        out->is_directory =
                out->exists && out->state.left > 0 && out->state.data[0] == BS_BTRFS_STATE_LISTING;
        return 0;
}

static int load_old(struct walk *walk, uint64_t number, struct old *out)
{
        int result;

        *out = (struct old){.in_tree = walk->diff->base != NULL};
        if (!out->in_tree)
                return recall(walk, number, out);
        result = enter(walk, &walk->base, number);
        if (result == 0)
                result = take_inode(&walk->base, number, &out->inode, &out->exists);
        out->is_directory = out->exists && S_ISDIR(out->inode.mode);
        return result;
}

static int add_links(struct walk *walk, const struct bs_btrfs_item *item)
{
        struct bs_bytes *to = &walk->parts[LINKS];
        struct bs_btrfs_link link;

        for (uint32_t at = 0; at < item->length;) {
                int result = bs_btrfs_link_parse(item, walk->error, &at, &link);

                if (result < 0)
                        return result;
                bs_bytes_add_number(to, link.parent, 8);
                bs_bytes_add_number(to, link.name_length, 2);
                bs_bytes_add(to, link.name, link.name_length);
        }
        return 0;
}

static int add_xattrs(struct walk *walk, const struct bs_btrfs_item *item)
{
        struct bs_bytes *to = &walk->parts[XATTRS];
        struct bs_btrfs_entry entry;

        for (uint32_t at = 0; at < item->length;) {
                int result = bs_btrfs_entry_parse(item, walk->error, &at, &entry);

                if (result < 0)
                        return result;
                bs_bytes_add_number(to, entry.name_length, 2);
                bs_bytes_add_number(to, entry.data_length, 2);
                bs_bytes_add(to, entry.name, entry.name_length);
                bs_bytes_add(to, entry.data, entry.data_length);
        }
        return 0;
}

/* The items between INODE_ITEM and what only directories and files with content have. */
static int gather(struct walk *walk, uint64_t number)
{
        const struct bs_btrfs_item *item;

        for (;;) {
                int result = bs_btrfs_peek(&walk->tree, &item);

                if (result < 0 || !item || item->key.objectid != number ||
                    item->key.type >= BS_BTRFS_DIR_ITEM)
                        return result;
                if (item->key.type == BS_BTRFS_INODE_REF || item->key.type == BS_BTRFS_INODE_EXTREF)
                        result = add_links(walk, item);
                else if (item->key.type == BS_BTRFS_XATTR_ITEM)
                        result = add_xattrs(walk, item);
                if (result < 0)
                        return result;
                bs_btrfs_advance(&walk->tree);
        }
}

static int no_name(void *context, struct bs_btrfs_name *out)
{
        (void)context;
        out->length = 0;
        return 0;
}

static int compare_names(struct walk *walk, uint64_t number, const struct old *old, bool is_directory)
{
        const struct bs_btrfs_key first = {.objectid = number, .type = BS_BTRFS_DIR_INDEX};
        struct bs_btrfs_tree_names tree = {.cursor = &walk->tree, .inode = number};
        struct bs_btrfs_tree_names base = {.cursor = &walk->base, .inode = number};
        struct bs_btrfs_name_source before = {.next = no_name};
        struct bs_btrfs_name_source now = {.next = no_name};
        struct bs_btrfs_state_names state;
        int result = 0;

        if (is_directory) {
                now = bs_btrfs_tree_names(&tree);
                result = bs_btrfs_forward(&walk->tree, &first);
        }
        if (result == 0 && old->is_directory && old->in_tree) {
                before = bs_btrfs_tree_names(&base);
                result = bs_btrfs_forward(&walk->base, &first);
        } else if (result == 0 && old->is_directory) {
                before = bs_btrfs_state_names(&state);
                result = bs_btrfs_state_names_init(&old->state, number, walk->error, &state);
        }
        if (result < 0)
                return result;
        return bs_btrfs_compare_names(before, now, &walk->parts[ADDED], &walk->parts[REMOVED],
                                      walk->diff->remember && is_directory ? &walk->parts[STATE] : NULL);
}

static int compare_extents(struct walk *walk, uint64_t number, const struct bs_btrfs_inode *inode,
                           const struct old *old)
{
        const struct bs_btrfs_key first = {.objectid = number, .type = BS_BTRFS_EXTENT_DATA};
        uint32_t block = walk->diff->block;
        struct bs_btrfs_tree_extents tree;
        struct bs_btrfs_tree_extents base;
        struct bs_btrfs_state_extents state = {.unknown = false};
        struct bs_btrfs_compare compare = {
                .old_size = old->exists ? old->inode.size : 0, .size = inode->size, .block = block};
        int result = bs_btrfs_forward(&walk->tree, &first);

        bs_btrfs_tree_extents_init(&walk->tree, number, block,
                                   walk->diff->remember ? &walk->parts[STATE] : NULL, &tree);
        bs_btrfs_tree_extents_init(&walk->base, number, block, NULL, &base);
        compare.present = bs_btrfs_tree_source(&tree);
        compare.old = bs_btrfs_state_source(&state);
        if (result == 0 && old->exists && old->in_tree) {
                compare.old = bs_btrfs_tree_source(&base);
                result = bs_btrfs_forward(&walk->base, &first);
        } else if (old->exists && old->has_state && old->state.left > 0) {
                bs_btrfs_state_extents_init(&old->state, block, &state);
        } else if (old->exists) {
                bs_btrfs_unknown_extents_init(&state);
        }
        if (result == 0)
                result = bs_btrfs_compare_extents(&compare, &walk->changed, &walk->holes);
        if (result < 0 || (bs_btrfs_adds_up(&tree, inode) &&
                           (!old->exists || !old->in_tree || bs_btrfs_adds_up(&base, &old->inode))))
                return result;
        walk->changed.count = walk->holes.count = 0;
        bs_bytes_clear(&walk->parts[STATE]);
        return bs_extents_append(&walk->changed, 0, inode->size);
}

static int take_target(struct walk *walk, uint64_t number)
{
        const struct bs_btrfs_key first = {.objectid = number, .type = BS_BTRFS_EXTENT_DATA};
        const struct bs_btrfs_item *item;
        struct bs_btrfs_extent extent;
        int result = bs_btrfs_forward(&walk->tree, &first);

        if (result == 0)
                result = bs_btrfs_peek(&walk->tree, &item);
        if (result < 0)
                return result;
        if (!item || item->key.objectid != number || item->key.type != BS_BTRFS_EXTENT_DATA)
                return bs_fail_block(walk->error, number, "a symbolic link leads nowhere");
        result = bs_btrfs_extent_parse(item, walk->diff->block, walk->error, &extent);
        if (result < 0)
                return result;
        if (extent.kind != BS_BTRFS_INLINE || extent.compression != 0)
                return bs_fail_block(walk->error, number, "the target of a symbolic link is no plain text");
        bs_bytes_add(&walk->parts[TARGET], extent.data, extent.data_length);
        return 0;
}

static void pack_extents(struct bs_bytes *to, const struct bs_extents *extents)
{
        uint8_t *room = bs_bytes_extend(to, extents->count * BS_PACKED_EXTENT_SIZE);

        if (room)
                bs_extents_pack(extents, room);
}

static int write_record(struct walk *walk, uint64_t number, const struct bs_btrfs_inode *inode, bool is_new)
{
        struct bs_bytes *out = walk->out;
        const uint64_t longs[] = {number, inode->generation, inode->size, inode->rdev, inode->flags};
        const uint32_t words[] = {inode->mode, inode->uid, inode->gid, inode->nlink, is_new};

        pack_extents(&walk->parts[CHANGED], &walk->changed);
        pack_extents(&walk->parts[HOLES], &walk->holes);
        for (size_t i = 0; i < sizeof(longs) / sizeof(*longs); i++)
                bs_bytes_add_number(out, longs[i], 8);
        for (size_t i = 0; i < BS_BTRFS_TIMES; i++)
                bs_bytes_add_number(out, (uint64_t)inode->times[i].seconds, 8);
        for (size_t i = 0; i < BS_BTRFS_TIMES; i++)
                bs_bytes_add_number(out, inode->times[i].nanoseconds, 4);
        for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
                bs_bytes_add_number(out, words[i], 4);
        for (size_t i = 0; i < PARTS; i++)
                bs_bytes_add_number(out, walk->parts[i].count, 8);
        for (size_t i = 0; i < PARTS; i++) {
                if (bs_bytes_status(&walk->parts[i]) < 0)
                        return -ENOMEM;
                bs_bytes_add(out, walk->parts[i].data, walk->parts[i].count);
        }
        return bs_bytes_status(out);
}

static int compare_inode(struct walk *walk, uint64_t number)
{
        struct bs_btrfs_inode inode;
        struct old old;
        bool found;
        int result = enter(walk, &walk->tree, number);

        if (result == 0)
                result = take_inode(&walk->tree, number, &inode, &found);
        if (result < 0 || !found)
                return result;
        result = load_old(walk, number, &old);
        if (result < 0)
                return result;

        bool is_directory = S_ISDIR(inode.mode);
        bool is_new = !old.exists || old.inode.generation != inode.generation;

        walk->changed.count = walk->holes.count = 0;
        for (size_t i = 0; i < PARTS; i++)
                bs_bytes_clear(&walk->parts[i]);
        result = gather(walk, number);
        if (result == 0 && !is_new && is_directory && !old.is_directory)
                return refuse_memory(walk, number);
        if (result == 0 && (is_directory || old.is_directory))
                result = compare_names(walk, number, &old, is_directory);
        if (is_new)
                old.exists = false;
        if (result == 0 && S_ISREG(inode.mode))
                result = compare_extents(walk, number, &inode, &old);
        if (result == 0 && S_ISLNK(inode.mode))
                result = take_target(walk, number);
        return result < 0 ? result : write_record(walk, number, &inode, is_new);
}

static int check_numbers(const struct bs_btrfs_diff *diff, struct bs_error *error)
{
        uint64_t last = BS_BTRFS_FIRST_INODE - 1;

        for (size_t i = 0; i < diff->count; i++) {
                uint64_t number = number_at(diff, i);

                if (number <= last || number > BS_BTRFS_LAST_INODE)
                        return bs_fail_range(error, "inode numbers have to ascend, from 256 on");
                last = number;
        }
        if (diff->block < 512 || (diff->block & (diff->block - 1)))
                return bs_fail_range(error, "a sector size is a power of two, and 512 or more");
        return 0;
}

int bs_btrfs_diff(const struct bs_btrfs_diff *diff, const struct bs_interrupt *interrupt,
                  struct bs_error *error, struct bs_bytes *out, size_t *done)
{
        _cleanup_(walk_deinit) struct walk walk = {
                .diff = diff,
                .error = error,
                .memory = diff->memory,
                .out = out,
        };
        int result = check_numbers(diff, error);

        *done = 0;
        if (result == 0)
                result = bs_btrfs_cursor_init(diff->tree, interrupt, error, INODE_BUFFER, &walk.tree);
        if (result == 0 && diff->base)
                result = bs_btrfs_cursor_init(diff->base, interrupt, error, INODE_BUFFER, &walk.base);
        while (result == 0 && walk.at < diff->count && out->count < diff->limit) {
                result = compare_inode(&walk, number_at(diff, walk.at));
                walk.at++;
        }
        *done = walk.at;
        return result;
}
