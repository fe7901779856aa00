/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_tree.h"
#include "check.h"

static struct bs_error error;

static struct bs_btrfs_item item_of(uint8_t type, uint64_t offset, const void *data, size_t length)
{
        return (struct bs_btrfs_item){
                .key = {.objectid = 257, .type = type, .offset = offset},
                .data = data,
                .length = (uint32_t)length,
        };
}

static void check_refused(int result, const char *reason)
{
        CHECK_EQUAL(result, -EUCLEAN);
        CHECK_EQUAL(error.block, 257);
        if (!strstr(error.reason, reason))
                fprintf(stderr, "reason is: %s\n", error.reason);
        CHECK(strstr(error.reason, reason));
}

static void test_inode(void)
{
        uint8_t data[160];
        struct bs_btrfs_inode inode;

        for (size_t i = 0; i < sizeof(data); i++)
                data[i] = (uint8_t)i;
        tree_poke(data + 16, 123456, 8);

        struct bs_btrfs_item item = item_of(BS_BTRFS_INODE_ITEM, 0, data, sizeof(data));

        CHECK_EQUAL(bs_btrfs_inode_parse(&item, &error, &inode), 0);
        CHECK_EQUAL(inode.generation, 0x0706050403020100);
        CHECK_EQUAL(inode.transid, 0x0f0e0d0c0b0a0908);
        CHECK_EQUAL(inode.size, 123456);
        CHECK_EQUAL(inode.allocated, 0x1f1e1d1c1b1a1918);
        CHECK_EQUAL(inode.nlink, 0x2b2a2928);
        CHECK_EQUAL(inode.uid, 0x2f2e2d2c);
        CHECK_EQUAL(inode.gid, 0x33323130);
        CHECK_EQUAL(inode.mode, 0x37363534);
        CHECK_EQUAL(inode.rdev, 0x3f3e3d3c3b3a3938);
        CHECK_EQUAL(inode.flags, 0x4746454443424140);
        CHECK_EQUAL(inode.times[BS_BTRFS_ATIME].seconds, 0x7776757473727170);
        CHECK_EQUAL(inode.times[BS_BTRFS_ATIME].nanoseconds, 0x7b7a7978);
        CHECK_EQUAL(inode.times[BS_BTRFS_OTIME].nanoseconds, 0x9f9e9d9c);
        for (item.length = 0; item.length < 160; item.length++)
                check_refused(bs_btrfs_inode_parse(&item, &error, &inode), "too short");
        item.length = 160;
        tree_poke(data + 16, 1ULL << 63, 8);
        check_refused(bs_btrfs_inode_parse(&item, &error, &inode), "larger than files can be");
}

static void test_links(void)
{
        static const char two[] = "\1\0\0\0\0\0\0\0\3\0one\2\0\0\0\0\0\0\0\5\0other";
        static const char extended[] = "\x44\1\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2\0me";
        struct bs_btrfs_item item = item_of(BS_BTRFS_INODE_REF, 300, two, sizeof(two) - 1);
        struct bs_btrfs_link link;
        uint32_t at = 0;

        CHECK_EQUAL(bs_btrfs_link_parse(&item, &error, &at, &link), 0);
        CHECK(link.parent == 300 && link.name_length == 3 && memcmp(link.name, "one", 3) == 0);
        CHECK_EQUAL(bs_btrfs_link_parse(&item, &error, &at, &link), 0);
        CHECK(link.name_length == 5 && memcmp(link.name, "other", 5) == 0);
        CHECK_EQUAL(at, item.length);
        for (uint32_t cut = 1; cut < 13; cut++) {
                item.length = cut;
                at = 0;
                check_refused(bs_btrfs_link_parse(&item, &error, &at, &link), "cut off");
        }
        item = item_of(BS_BTRFS_INODE_EXTREF, 12345, extended, sizeof(extended) - 1);
        at = 0;
        CHECK_EQUAL(bs_btrfs_link_parse(&item, &error, &at, &link), 0);
        CHECK(link.parent == 0x144 && link.name_length == 2 && memcmp(link.name, "me", 2) == 0);
        for (uint32_t cut = 1; cut < item.length;) {
                item.length--;
                at = 0;
                check_refused(bs_btrfs_link_parse(&item, &error, &at, &link), "cut off");
        }
}

/* Two extended attributes whose names have the same hash share an item. */
static void test_entries(void)
{
        uint8_t data[30 + 4 + 5 + 30 + 3] = {0};
        struct bs_btrfs_entry entry;
        uint32_t at = 0;

        tree_poke(data + 25, 5, 2);
        tree_poke(data + 27, 4, 2);
        data[29] = 8;
        memcpy(data + 30, "namevalue", 9);
        tree_poke(data + 39, 258, 8);
        data[39 + 8] = 1;
        tree_poke(data + 39 + 9, 77, 8);
        tree_poke(data + 39 + 27, 3, 2);
        memcpy(data + 69, "abc", 3);

        struct bs_btrfs_item item = item_of(BS_BTRFS_XATTR_ITEM, 0, data, sizeof(data));

        CHECK_EQUAL(bs_btrfs_entry_parse(&item, &error, &at, &entry), 0);
        CHECK(entry.name_length == 4 && memcmp(entry.name, "name", 4) == 0);
        CHECK(entry.data_length == 5 && memcmp(entry.data, "value", 5) == 0);
        CHECK_EQUAL(entry.type, 8);
        CHECK_EQUAL(bs_btrfs_entry_parse(&item, &error, &at, &entry), 0);
        CHECK(entry.location.objectid == 258 && entry.location.type == 1 && entry.location.offset == 77);
        CHECK(entry.name_length == 3 && entry.data_length == 0);
        CHECK_EQUAL(at, item.length);
        for (item.length = 40; item.length < sizeof(data); item.length++) {
                at = 39;
                check_refused(bs_btrfs_entry_parse(&item, &error, &at, &entry), "cut off");
        }
        for (item.length = 0; item.length < 39; item.length++) {
                at = 0;
                check_refused(bs_btrfs_entry_parse(&item, &error, &at, &entry), "cut off");
        }
}

static void fill_extent(uint8_t data[53], uint8_t kind)
{
        memset(data, 0, 53);
        tree_poke(data, 99, 8);
        tree_poke(data + 8, 131072, 8);
        data[16] = 3;
        data[20] = kind;
        tree_poke(data + 21, 1 << 20, 8);
        tree_poke(data + 29, 8192, 8);
        tree_poke(data + 37, 4096, 8);
        tree_poke(data + 45, 65536, 8);
}

static void test_extents(void)
{
        uint8_t data[53];
        struct bs_btrfs_item item = item_of(BS_BTRFS_EXTENT_DATA, 12288, data, sizeof(data));
        struct bs_btrfs_extent extent;

        fill_extent(data, BS_BTRFS_REGULAR);
        CHECK_EQUAL(bs_btrfs_extent_parse(&item, 4096, &error, &extent), 0);
        CHECK(extent.begin == 12288 && extent.end == 12288 + 65536 && extent.generation == 99);
        CHECK(extent.address == 1 << 20 && extent.disk_length == 8192 && extent.offset == 4096);
        CHECK(extent.kind == BS_BTRFS_REGULAR && extent.compression == 3);
        data[20] = BS_BTRFS_PREALLOC;
        CHECK_EQUAL(bs_btrfs_extent_parse(&item, 4096, &error, &extent), 0);
        CHECK_EQUAL(extent.kind, BS_BTRFS_PREALLOC);
        tree_poke(data + 21, 0, 8);
        CHECK_EQUAL(bs_btrfs_extent_parse(&item, 4096, &error, &extent), 0);
        CHECK_EQUAL(extent.kind, BS_BTRFS_HOLE);
        for (item.length = 0; item.length < 53; item.length++)
                check_refused(bs_btrfs_extent_parse(&item, 4096, &error, &extent), "too short");
}

static void check_bad_extent(size_t offset, uint64_t value, size_t size, const char *reason)
{
        uint8_t data[53];
        struct bs_btrfs_item item = item_of(BS_BTRFS_EXTENT_DATA, 12288, data, sizeof(data));
        struct bs_btrfs_extent extent;

        fill_extent(data, BS_BTRFS_REGULAR);
        tree_poke(data + offset, value, size);
        check_refused(bs_btrfs_extent_parse(&item, 4096, &error, &extent), reason);
}

static void test_extents_that_cannot_be(void)
{
        check_bad_extent(17, 1, 1, "encoded");
        check_bad_extent(18, 1, 2, "encoded");
        check_bad_extent(20, 3, 1, "kind");
        check_bad_extent(45, 0, 8, "cannot be");
        check_bad_extent(45, UINT64_MAX - 4095, 8, "cannot be");
        check_bad_extent(45, 1ULL << 63, 8, "cannot be");
        check_bad_extent(37, UINT64_MAX - 4095, 8, "cannot be");
        check_bad_extent(29, UINT64_MAX - 4095, 8, "cannot be");
        check_bad_extent(45, 100, 8, "whole blocks");
        check_bad_extent(37, 512, 8, "whole blocks");
        check_bad_extent(29, 512, 8, "whole blocks");
        check_bad_extent(21, (1 << 20) + 512, 8, "whole blocks");
}

static void test_inline_extents(void)
{
        uint8_t data[21 + 5] = {0};
        struct bs_btrfs_item item = item_of(BS_BTRFS_EXTENT_DATA, 0, data, sizeof(data));
        struct bs_btrfs_extent extent;

        memcpy(data + 21, "hello", 5);
        /* The logical length counts only where it has to. */
        tree_poke(data + 8, 9999, 8);
        CHECK_EQUAL(bs_btrfs_extent_parse(&item, 4096, &error, &extent), 0);
        CHECK(extent.kind == BS_BTRFS_INLINE && extent.begin == 0 && extent.end == 4096);
        CHECK(extent.data_length == 5 && memcmp(extent.data, "hello", 5) == 0);
        data[16] = 1;
        CHECK_EQUAL(bs_btrfs_extent_parse(&item, 4096, &error, &extent), 0);
        CHECK_EQUAL(extent.end, 12288);
        tree_poke(data + 8, 1ULL << 40, 8);
        check_refused(bs_btrfs_extent_parse(&item, 4096, &error, &extent), "inline");
        item.key.offset = 4096;
        check_refused(bs_btrfs_extent_parse(&item, 4096, &error, &extent), "inline");
}

int main(void)
{
        test_inode();
        test_links();
        test_entries();
        test_extents();
        test_extents_that_cannot_be();
        test_inline_extents();
        return 0;
}
