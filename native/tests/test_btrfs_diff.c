/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_diff.h"
#include "btrfs_listing.h"
#include "btrfs_tree.h"
#include "check.h"
#include "cleanup.h"

#include <sys/stat.h>

enum {
        RECORD_HEAD = 40 + 32 + 36 + 64,
        CHANGED = 0,
        HOLES,
        ADDED,
        REMOVED,
        LINKS,
        XATTRS,
        TARGET,
        STATE,
};

static const struct bs_interrupt never = {.check = NULL};

struct answer {
        struct bs_bytes records;
        struct bs_error error;
        size_t done;
};

static void answer_deinit(struct answer *answer)
{
        bs_bytes_deinit(&answer->records);
}

static uint64_t number(const uint8_t *from, size_t size)
{
        uint64_t value = 0;

        memcpy(&value, from, size);
        return le64toh(value);
}

/* Compare the inodes 256 to 255 + `count`. */
static int diff_with(struct tree *tree, struct tree *base, const struct bs_bytes *memory, size_t count,
                     size_t limit, struct answer *out)
{
        uint8_t numbers[8 * 64];
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_btrfs_source base_source = base ? tree_source(base) : source;
        struct bs_btrfs_diff request = {
                .tree = &source,
                .base = base ? &base_source : NULL,
                .numbers = numbers,
                .count = count,
                .block = TREE_BLOCK,
                .remember = true,
                .limit = limit,
        };

        CHECK(count <= 64);
        for (size_t i = 0; i < count; i++)
                tree_poke(numbers + 8 * i, BS_BTRFS_FIRST_INODE + i, 8);
        if (memory)
                request.memory = (struct bs_span){.data = memory->data, .left = memory->count};
        *out = (struct answer){.done = 0};
        return bs_btrfs_diff(&request, &never, &out->error, &out->records, &out->done);
}

static int diff(struct tree *tree, struct tree *base, const struct bs_bytes *memory, struct answer *out)
{
        return diff_with(tree, base, memory, 8, SIZE_MAX, out);
}

/* Find the record of an inode; NULL when there is none. */
static const uint8_t *record_of(const struct answer *answer, uint64_t inode)
{
        for (size_t at = 0; at < answer->records.count;) {
                const uint8_t *record = answer->records.data + at;

                if (number(record, 8) == inode)
                        return record;
                at += RECORD_HEAD;
                for (size_t part = 0; part < 8; part++)
                        at += number(record + RECORD_HEAD - 64 + 8 * part, 8);
        }
        return NULL;
}

static struct bs_span part_of(const struct answer *answer, uint64_t inode, unsigned part)
{
        const uint8_t *record = record_of(answer, inode);
        size_t at = RECORD_HEAD;

        CHECK(record);
        for (unsigned i = 0; i < part; i++)
                at += number(record + RECORD_HEAD - 64 + 8 * i, 8);
        return (struct bs_span){
                .data = record + at,
                .left = number(record + RECORD_HEAD - 64 + 8 * part, 8),
        };
}

static void check_extent(const struct answer *answer, uint64_t inode, unsigned part, uint64_t offset,
                         uint64_t length)
{
        struct bs_span packed = part_of(answer, inode, part);

        CHECK_EQUAL(packed.left, 16);
        CHECK_EQUAL(number(packed.data, 8), offset);
        CHECK_EQUAL(number(packed.data + 8, 8), length);
}

static bool is_new(const struct answer *answer, uint64_t inode)
{
        const uint8_t *record = record_of(answer, inode);

        CHECK(record);
        return number(record + RECORD_HEAD - 68, 4) == 1;
}

/* The same some transactions later: an extent replaced, another punched out, names moved, a file added. */
static struct tree *tree_of_later(void)
{
        struct tree *tree = tree_of_files();

        tree->transid = 20;
        tree_remove(tree, 257, BS_BTRFS_EXTENT_DATA, 0);
        tree_extent(tree, 257, BS_BTRFS_REGULAR, 0, 16384, 1 << 20);
        tree_remove(tree, 257, BS_BTRFS_EXTENT_DATA, 16384);
        tree_remove(tree, 257, BS_BTRFS_INODE_ITEM, 0);
        tree_inode(tree, 257, FILE_MODE, 50000, 24576);
        tree_remove(tree, 256, BS_BTRFS_DIR_INDEX, 3);
        tree_remove(tree, 256, BS_BTRFS_DIR_ITEM, 3 * 7919);
        tree_remove(tree, 258, BS_BTRFS_INODE_REF, 256);
        tree_name(tree, 259, 2, "moved", 258, 7);
        tree_name(tree, 259, 3, "new", 260, 1);
        tree_poke(tree_inode(tree, 260, FILE_MODE, 3, 3), 20, 8);
        tree_inline(tree, 260, "abc");
        return tree;
}

static void check_names(const struct answer *answer, uint64_t inode, unsigned part, uint64_t index,
                        uint64_t target, const char *name)
{
        struct bs_span names = part_of(answer, inode, part);

        CHECK_EQUAL(names.left, 18 + strlen(name));
        CHECK_EQUAL(number(names.data, 8), index);
        CHECK_EQUAL(number(names.data + 8, 8), target);
        CHECK(memcmp(names.data + 18, name, strlen(name)) == 0);
}

static void check_later(const struct answer *answer)
{
        CHECK_EQUAL(answer->done, 8);
        CHECK(!record_of(answer, 261));
        CHECK(!is_new(answer, 256) && !is_new(answer, 257) && !is_new(answer, 258));
        CHECK(is_new(answer, 260));
        check_extent(answer, 257, CHANGED, 0, 16384);
        check_extent(answer, 257, HOLES, 16384, 16384);
        check_extent(answer, 260, CHANGED, 0, 3);
        CHECK_EQUAL(part_of(answer, 256, ADDED).left, 0);
        check_names(answer, 256, REMOVED, 3, 258, "link");
        CHECK_EQUAL(part_of(answer, 259, REMOVED).left, 0);
        CHECK_EQUAL(part_of(answer, 259, ADDED).left, 18 + 5 + 18 + 3);
        CHECK(memcmp(part_of(answer, 258, TARGET).data, "target", 6) == 0);

        struct bs_span links = part_of(answer, 258, LINKS);

        CHECK_EQUAL(links.left, 10 + 5);
        CHECK_EQUAL(number(links.data, 8), 259);
        CHECK(memcmp(links.data + 10, "moved", 5) == 0);
}

static void test_against_a_base(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_later();
        struct answer answer;

        CHECK_EQUAL(diff(tree, base, NULL, &answer), 0);
        check_later(&answer);
        answer_deinit(&answer);
        CHECK_EQUAL(diff(base, base, NULL, &answer), 0);
        for (uint64_t inode = 256; inode < 260; inode++) {
                for (unsigned part = CHANGED; part <= REMOVED; part++)
                        CHECK_EQUAL(part_of(&answer, inode, part).left, 0);
        }
        answer_deinit(&answer);
        tree_destroy(base);
        tree_destroy(tree);
}

/* What a first answer says to remember is all that the second one needs. */
static void test_against_memory(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_later();
        struct bs_bytes memory = {.data = NULL};
        struct answer first;
        struct answer answer;

        CHECK_EQUAL(diff(base, NULL, NULL, &first), 0);
        for (uint64_t inode = 256; inode < 260; inode++) {
                CHECK(is_new(&first, inode));
                memory_add(&memory, inode, 5, number(record_of(&first, inode) + 16, 8),
                           part_of(&first, inode, STATE));
        }
        CHECK_EQUAL(diff(tree, NULL, &memory, &answer), 0);
        check_later(&answer);
        answer_deinit(&answer);
        answer_deinit(&first);
        bs_bytes_deinit(&memory);
        tree_destroy(base);
        tree_destroy(tree);
}

static void test_a_file_without_a_state(void)
{
        struct tree *tree = tree_of_files();
        struct bs_bytes memory = {.data = NULL};
        struct answer answer;

        memory_add(&memory, 257, 5, 50000, (struct bs_span){.data = NULL});
        CHECK_EQUAL(diff(tree, NULL, &memory, &answer), 0);
        CHECK(!is_new(&answer, 257));
        CHECK_EQUAL(part_of(&answer, 257, CHANGED).left, 32);
        check_extent(&answer, 257, HOLES, 32768, 45056 - 32768);
        answer_deinit(&answer);
        bs_bytes_deinit(&memory);
        tree_destroy(tree);
}

static void test_another_file_under_the_same_number(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_files();
        struct answer answer;

        tree_remove(tree, 257, BS_BTRFS_INODE_ITEM, 0);
        tree_poke(tree_inode(tree, 257, FILE_MODE, 50000, 40960), 6, 8);
        /* 259 was a directory with a name in it. */
        tree_name(base, 259, 2, "inside", 300, 1);
        tree_remove(tree, 259, BS_BTRFS_INODE_ITEM, 0);
        tree_poke(tree_inode(tree, 259, FILE_MODE, 0, 0), 6, 8);
        CHECK_EQUAL(diff(tree, base, NULL, &answer), 0);
        CHECK(is_new(&answer, 257) && is_new(&answer, 259));
        CHECK_EQUAL(part_of(&answer, 257, CHANGED).left, 32);
        CHECK_EQUAL(part_of(&answer, 257, HOLES).left, 0);
        check_names(&answer, 259, REMOVED, 2, 300, "inside");
        answer_deinit(&answer);
        tree_destroy(base);
        tree_destroy(tree);
}

static void test_extents_that_do_not_add_up(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_files();
        struct answer answer;

        tree_remove(tree, 257, BS_BTRFS_EXTENT_DATA, 16384);
        CHECK_EQUAL(diff(tree, base, NULL, &answer), 0);
        check_extent(&answer, 257, CHANGED, 0, 50000);
        CHECK_EQUAL(part_of(&answer, 257, HOLES).left, 0);
        CHECK_EQUAL(part_of(&answer, 257, STATE).left, 0);
        answer_deinit(&answer);
        CHECK_EQUAL(diff(base, tree, NULL, &answer), 0);
        check_extent(&answer, 257, CHANGED, 0, 50000);
        answer_deinit(&answer);
        tree_destroy(base);
        tree_destroy(tree);
}

static void test_inodes_without_a_name(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_files();
        struct answer answer;

        tree_remove(tree, 257, BS_BTRFS_INODE_ITEM, 0);
        tree_poke(tree_inode(tree, 257, FILE_MODE, 50000, 40960) + 40, 0, 4);
        CHECK_EQUAL(diff(tree, base, NULL, &answer), 0);
        CHECK(!record_of(&answer, 257));
        answer_deinit(&answer);
        /* One that has a name again is new: nobody has stored it. */
        CHECK_EQUAL(diff(base, tree, NULL, &answer), 0);
        CHECK(is_new(&answer, 257));
        answer_deinit(&answer);
        tree_destroy(base);
        tree_destroy(tree);
}

static void test_xattrs(void)
{
        uint8_t item[30 + 4 + 5 + 30 + 4 + 1] = {0};
        struct tree *tree = tree_of_files();
        struct answer answer;

        tree_poke(item + 25, 5, 2);
        tree_poke(item + 27, 4, 2);
        memcpy(item + 30, "namevalue", 9);
        tree_poke(item + 39 + 25, 1, 2);
        tree_poke(item + 39 + 27, 4, 2);
        memcpy(item + 69, "more1", 5);
        tree_add(tree, 257, BS_BTRFS_XATTR_ITEM, 1234, item, sizeof(item));
        CHECK_EQUAL(diff(tree, NULL, NULL, &answer), 0);

        struct bs_span xattrs = part_of(&answer, 257, XATTRS);

        CHECK_EQUAL(xattrs.left, 4 + 9 + 4 + 5);
        CHECK(memcmp(xattrs.data, "\4\0\5\0namevalue\4\0\1\0more1", xattrs.left) == 0);
        answer_deinit(&answer);
        tree_destroy(tree);
}

static void test_touched(void)
{
        struct tree *tree = tree_of_later();
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_btrfs_touched touched;
        struct bs_error error;

        tree_poke(tree_inode(tree, 300, FILE_MODE, 0, 0) + 40, 0, 4);
        /* What has to do with the tree itself, and not with files. */
        tree_add(tree, 6, BS_BTRFS_INODE_ITEM, 0, "", 0);
        tree_add(tree, -5ULL, 48, 300, "", 0);
        CHECK_EQUAL(bs_btrfs_touched(&source, 19, &never, &error, &touched), 0);
        CHECK_EQUAL(touched.numbers.count, 16);
        CHECK_EQUAL(number(touched.numbers.data, 8), 257);
        CHECK_EQUAL(number(touched.numbers.data + 8, 8), 260);
        CHECK_EQUAL(number(touched.transactions.data, 8), 20);
        CHECK_EQUAL(number(touched.transactions.data + 8, 8), 20);
        CHECK_EQUAL(number(touched.modes.data + 4, 4), FILE_MODE);
        bs_btrfs_touched_deinit(&touched);
        CHECK_EQUAL(bs_btrfs_touched(&source, 0, &never, &error, &touched), 0);
        CHECK_EQUAL(touched.numbers.count, 40);
        bs_btrfs_touched_deinit(&touched);
        /* Of the snapshot's own transaction only directories count. */
        tree_inode(tree, 301, FOLDER_MODE, 0, 0);
        CHECK_EQUAL(bs_btrfs_touched(&source, 20, &never, &error, &touched), 0);
        CHECK_EQUAL(touched.numbers.count, 8);
        CHECK_EQUAL(number(touched.numbers.data, 8), 301);
        bs_btrfs_touched_deinit(&touched);
        CHECK_EQUAL(bs_btrfs_touched(&source, 21, &never, &error, &touched), 0);
        CHECK_EQUAL(touched.items, 0);
        bs_btrfs_touched_deinit(&touched);
        tree_destroy(tree);
}

static int touch_all(struct tree *tree)
{
        _cleanup_(bs_btrfs_touched_deinit) struct bs_btrfs_touched touched;
        struct bs_btrfs_source source = tree_source(tree);
        struct bs_error error;

        return bs_btrfs_touched(&source, 0, &never, &error, &touched);
}

static void test_neighbours_are_read_together(void)
{
        struct tree *tree = tree_create();
        struct answer answer;

        for (uint64_t inode = 256; inode < 300; inode++)
                tree_inode(tree, inode, FILE_MODE, 0, 0);
        CHECK_EQUAL(diff_with(tree, tree, NULL, 40, SIZE_MAX, &answer), 0);
        CHECK_EQUAL(answer.done, 40);
        /* Of each tree: the items, and that there are no more. */
        CHECK_EQUAL(tree->searches, 4);
        answer_deinit(&answer);
        tree_destroy(tree);
}

static void test_the_limit(void)
{
        struct tree *tree = tree_of_files();
        struct answer answer;

        CHECK_EQUAL(diff_with(tree, NULL, NULL, 8, 1, &answer), 0);
        CHECK_EQUAL(answer.done, 1);
        CHECK(record_of(&answer, 256) && !record_of(&answer, 257));
        answer_deinit(&answer);
        tree_destroy(tree);
}

static int diff_once(struct tree *tree, struct tree *base, const struct bs_bytes *memory)
{
        _cleanup_(answer_deinit) struct answer answer;

        return diff(tree, base, memory, &answer);
}

static void test_two_files(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_later();
        struct bs_btrfs_source sources[] = {tree_source(base), tree_source(tree)};
        struct bs_btrfs_file old = {.tree = &sources[0], .inode = 257};
        struct bs_btrfs_file present = {.tree = &sources[1], .inode = 257};
        struct bs_btrfs_file_diff found;
        struct bs_error error;

        CHECK_EQUAL(bs_btrfs_diff_file(&old, &present, TREE_BLOCK, &never, &error, &found), 0);
        CHECK(found.changed.count == 1 && found.changed.items[0].length == 16384);
        CHECK(found.holes.count == 1 && found.holes.items[0].offset == 16384);
        CHECK_EQUAL(found.size, 50000);
        CHECK(found.state.count > 2);
        bs_btrfs_file_diff_deinit(&found);
        present.inode = 256;
        CHECK_EQUAL(bs_btrfs_diff_file(&old, &present, TREE_BLOCK, &never, &error, &found), -ERANGE);
        bs_btrfs_file_diff_deinit(&found);
        present.inode = 270;
        CHECK_EQUAL(bs_btrfs_diff_file(&old, &present, TREE_BLOCK, &never, &error, &found), -ENOENT);
        bs_btrfs_file_diff_deinit(&found);
        present.inode = 257;
        tree_remove(tree, 257, BS_BTRFS_EXTENT_DATA, 45056);
        CHECK_EQUAL(bs_btrfs_diff_file(&old, &present, TREE_BLOCK, &never, &error, &found), 0);
        CHECK(found.changed.count == 1 && found.changed.items[0].length == 50000);
        CHECK(found.holes.count == 0 && found.state.count == 0);
        bs_btrfs_file_diff_deinit(&found);
        tree_destroy(base);
        tree_destroy(tree);
}

static int diff_two_files(struct tree *base, struct tree *tree)
{
        _cleanup_(bs_btrfs_file_diff_deinit) struct bs_btrfs_file_diff found;
        struct bs_btrfs_source sources[] = {tree_source(base), tree_source(tree)};
        struct bs_btrfs_file old = {.tree = &sources[0], .inode = 257};
        struct bs_btrfs_file present = {.tree = &sources[1], .inode = 257};
        struct bs_error error;

        return bs_btrfs_diff_file(&old, &present, TREE_BLOCK, &never, &error, &found);
}

static void test_allocations(void)
{
        struct tree *base = tree_of_files();
        struct tree *tree = tree_of_later();

        CHECK_ALLOCATIONS(touch_all(tree));
        CHECK_ALLOCATIONS(diff_once(tree, base, NULL));
        CHECK_ALLOCATIONS(diff_two_files(base, tree));
        tree_destroy(base);
        tree_destroy(tree);
}

int main(void)
{
        test_against_a_base();
        test_against_memory();
        test_a_file_without_a_state();
        test_another_file_under_the_same_number();
        test_extents_that_do_not_add_up();
        test_inodes_without_a_name();
        test_xattrs();
        test_touched();
        test_neighbours_are_read_together();
        test_the_limit();
        test_two_files();
        test_allocations();
        return 0;
}
