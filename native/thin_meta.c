/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_meta.h"

#include "cleanup.h"
#include "crc32c.h"

#include <time.h>

enum {
        SUPERBLOCK_MAGIC = 27022010,
        MAX_VERSION = 2,
        SECTOR_SIZE = 512,
        MIN_CHUNK_SECTORS = 128,     /* 64 KiB */
        MAX_CHUNK_SECTORS = 2097152, /* 1 GiB */

        NODE_HEADER_SIZE = 32,
        KEY_SIZE = 8,
        INTERNAL_NODE = 1,
        LEAF_NODE = 2,

        ROOT_VALUE_SIZE = 8,
        DETAILS_VALUE_SIZE = 24,

        /* A torn block 0 is whole again as soon as one 4 KiB write is through. */
        TORN_ATTEMPTS = 8,
        TORN_WAIT_NANOSECONDS = 2000000,
        /* Every commit between our first and last read costs an attempt of about six reads. */
        COMMIT_ATTEMPTS = 500,
};

uint32_t bs_thin_checksum(const uint8_t *block, uint32_t salt)
{
        return bs_crc32c(UINT32_MAX, block + 4, BS_THIN_BLOCK_SIZE - 4) ^ salt;
}

static const char *superblock_fault(const uint8_t *block, uint64_t number,
                                    const struct bs_thin_superblock *parsed)
{
        uint32_t version = bs_le32(block + 40);
        uint64_t sectors = parsed->chunk_size / SECTOR_SIZE;

        if (bs_le64(block + 32) != SUPERBLOCK_MAGIC)
                return "not a thin-pool superblock";
        if (bs_le32(block) != bs_thin_checksum(block, BS_THIN_SUPERBLOCK_SALT))
                return "wrong checksum of the superblock";
        if (bs_le64(block + 8) != number)
                return "the superblock carries another block's number";
        if (version < 1 || version > MAX_VERSION)
                return "unknown metadata version";
        if (bs_le32(block + 360) != 0)
                return "the metadata uses unknown incompatible features";
        if (bs_le32(block + 340) != BS_THIN_BLOCK_SIZE / SECTOR_SIZE)
                return "metadata blocks are not 4096 bytes";
        if (sectors < MIN_CHUNK_SECTORS || sectors > MAX_CHUNK_SECTORS || sectors % MIN_CHUNK_SECTORS)
                return "impossible chunk size";
        if (number == 0 && parsed->metadata_blocks == 0)
                return "the metadata space map is empty";
        return NULL;
}

int bs_thin_superblock_parse(const uint8_t *block, uint64_t number, struct bs_error *error,
                             struct bs_thin_superblock *out)
{
        struct bs_thin_superblock parsed = {
                .flags = bs_le32(block + 4),
                .time = bs_le32(block + 44),
                .transaction_id = bs_le64(block + 48),
                .held_root = bs_le64(block + 56),
                .metadata_blocks = bs_le64(block + 192),
                .mapping_root = bs_le64(block + 320),
                .details_root = bs_le64(block + 328),
                .chunk_size = (uint64_t)bs_le32(block + 336) * SECTOR_SIZE,
        };
        const char *fault = superblock_fault(block, number, &parsed);

        if (fault)
                return bs_fail_block(error, number, fault);
        *out = parsed;
        return 0;
}

static const char *node_fault(const uint8_t *block, const struct bs_thin_place *place, uint32_t value_size)
{
        uint32_t flags = bs_le32(block + 4);
        uint32_t count = bs_le32(block + 16);
        uint32_t room = bs_le32(block + 20);
        uint32_t stored_size = bs_le32(block + 24);

        if (bs_le32(block) != bs_thin_checksum(block, BS_THIN_NODE_SALT))
                return "wrong checksum of a btree node";
        if (bs_le64(block + 8) != place->block)
                return "a btree node carries another block's number";
        if (flags != INTERNAL_NODE && flags != LEAF_NODE)
                return "a btree node is neither internal nor a leaf";
        if (stored_size != (flags == LEAF_NODE ? value_size : ROOT_VALUE_SIZE))
                return "values of a btree node have the wrong size";
        if (room > (BS_THIN_BLOCK_SIZE - NODE_HEADER_SIZE) / (KEY_SIZE + stored_size))
                return "a btree node claims more entries than fit a block";
        if (count > room)
                return "a btree node holds more entries than it has room for";
        if (count == 0 && flags == INTERNAL_NODE)
                return "an internal btree node has no children";
        return NULL;
}

static const char *key_fault(const struct bs_thin_node *node, const struct bs_thin_place *place)
{
        uint32_t falling = 0;

        if (node->count == 0)
                return NULL;
        for (uint32_t i = 1; i < node->count; i++)
                falling |= bs_thin_key(node, i) <= bs_thin_key(node, i - 1);
        if (falling)
                return "keys of a btree node do not ascend";
        if (bs_thin_key(node, 0) < place->low || bs_thin_key(node, node->count - 1) > place->last)
                return "a btree node holds a key that belongs elsewhere";
        return NULL;
}

int bs_thin_node_parse(const uint8_t *block, const struct bs_thin_place *place, uint32_t value_size,
                       struct bs_error *error, struct bs_thin_node *out)
{
        const char *fault = node_fault(block, place, value_size);

        if (fault)
                return bs_fail_block(error, place->block, fault);
        *out = (struct bs_thin_node){
                .keys = block + NODE_HEADER_SIZE,
                .values = block + NODE_HEADER_SIZE + KEY_SIZE * (size_t)bs_le32(block + 20),
                .count = bs_le32(block + 16),
                .value_size = bs_le32(block + 24),
                .leaf = bs_le32(block + 4) == LEAF_NODE,
        };
        fault = key_fault(out, place);
        return fault ? bs_fail_block(error, place->block, fault) : 0;
}

int bs_thin_block_check(uint64_t block, uint64_t metadata_blocks, struct bs_error *error)
{
        if (block == 0)
                return bs_fail_block(error, block, "a btree refers to the superblock as a node");
        if (block >= metadata_blocks)
                return bs_fail_block(error, block, "a btree refers to a block beyond the metadata");
        return 0;
}

static int read_block(const struct bs_reader *reader, uint64_t block, struct bs_error *error, uint8_t *out)
{
        int result = reader->read(reader->context, block * BS_THIN_BLOCK_SIZE, out, BS_THIN_BLOCK_SIZE);

        return result < 0 ? bs_fail_call(error, reader->call, result) : 0;
}

/* Index of the last key that is not above `key`, or -1. */
static int lower_bound(const struct bs_thin_node *node, uint64_t key)
{
        int low = -1;
        int high = (int)node->count;

        while (high - low > 1) {
                int middle = low + (high - low) / 2;

                if (bs_thin_key(node, (uint32_t)middle) <= key)
                        low = middle;
                else
                        high = middle;
        }
        return low;
}

/* Where a look-up reads: the pool, and one block's worth of buffer. */
struct lookup {
        const struct bs_reader *reader;
        uint64_t metadata_blocks;
        uint8_t *buffer;
        struct bs_error *error;
};

/* Copy the value of `key` in the tree at `root` to `out`; -ENOKEY when there is none. */
static int look_up(const struct lookup *in, uint64_t root, uint64_t key, uint32_t value_size, uint8_t *out)
{
        struct bs_thin_place place = {.block = root, .low = 0, .last = UINT64_MAX};

        for (unsigned depth = 0; depth < BS_THIN_MAX_DEPTH; depth++) {
                struct bs_thin_node node;
                int result = bs_thin_block_check(place.block, in->metadata_blocks, in->error);

                if (result == 0)
                        result = read_block(in->reader, place.block, in->error, in->buffer);
                if (result == 0)
                        result = bs_thin_node_parse(in->buffer, &place, value_size, in->error, &node);
                if (result < 0)
                        return result;

                int index = lower_bound(&node, key);

                if (index < 0 || (node.leaf && bs_thin_key(&node, (uint32_t)index) != key))
                        return -ENOKEY;
                if (node.leaf) {
                        memcpy(out, node.values + (size_t)value_size * (size_t)index, value_size);
                        return 0;
                }
                place = bs_thin_child(&node, &place, (uint32_t)index);
        }
        return bs_fail_block(in->error, root, "a btree is too deep");
}

static int look_up_device(const struct lookup *in, const struct bs_thin_superblock *superblock,
                          uint64_t device_id, struct bs_thin_device *out)
{
        uint8_t root[ROOT_VALUE_SIZE];
        uint8_t details[DETAILS_VALUE_SIZE];
        int result = look_up(in, superblock->mapping_root, device_id, sizeof(root), root);

        if (result == 0)
                result = look_up(in, superblock->details_root, device_id, sizeof(details), details);
        if (result < 0)
                return result;
        *out = (struct bs_thin_device){
                .root = bs_le64(root),
                .mapped_blocks = bs_le64(details),
                .transaction_id = bs_le64(details + 8),
                .creation_time = bs_le32(details + 16),
                .snapshotted_time = bs_le32(details + 20),
        };
        return bs_thin_block_check(out->root, in->metadata_blocks, in->error);
}

/* What find_once() says, beside 0 and -errno, when it has to be called again. */
enum { POOL_COMMITTED = 1, SUPERBLOCK_TORN = 2 };

/* Read block 0 to `to` and take it apart. */
static int read_block0(const struct lookup *in, uint8_t *to, struct bs_thin_superblock *out)
{
        int result = read_block(in->reader, 0, in->error, to);

        if (result < 0)
                return result;
        if (bs_thin_superblock_parse(to, 0, in->error, out) < 0)
                return SUPERBLOCK_TORN;
        if (out->metadata_blocks > in->reader->size / BS_THIN_BLOCK_SIZE)
                return bs_fail_block(in->error, 0, "the metadata device is smaller than the pool expects");
        return 0;
}

/*
 * One attempt to find a device.
 *
 * Nodes of a committed transaction are not reused before the next commit is on disk, and that changes
 * block 0; so whatever was read between two equal copies of block 0 belongs together.
 */
static int find_once(const struct lookup *in, uint64_t device_id, uint8_t *block0, struct bs_thin_view *out)
{
        struct lookup sized = *in;
        int result = read_block0(in, block0, &out->superblock);

        if (result != 0)
                return result;
        sized.metadata_blocks = out->superblock.metadata_blocks;
        result = look_up_device(&sized, &out->superblock, device_id, &out->device);

        struct bs_error again = {.call = NULL};
        int reread = read_block(in->reader, 0, &again, in->buffer);

        if (reread < 0) {
                *in->error = again;
                return reread;
        }
        return memcmp(block0, in->buffer, BS_THIN_BLOCK_SIZE) == 0 ? result : POOL_COMMITTED;
}

/* The same in a metadata snapshot, whose nodes stay as they are for as long as block 0 names it. */
static int find_held(const struct lookup *in, uint64_t held_root, uint64_t device_id, uint8_t *block0,
                     struct bs_thin_view *out)
{
        static const char not_held[] = "the pool does not hold that metadata snapshot";
        struct lookup sized = *in;
        struct bs_thin_superblock live;
        int result = read_block0(in, block0, &live);

        if (result != 0)
                return result;
        if (live.held_root != held_root)
                return bs_fail_range(in->error, not_held);
        sized.metadata_blocks = live.metadata_blocks;
        result = bs_thin_block_check(held_root, live.metadata_blocks, in->error);
        if (result == 0)
                result = read_block(in->reader, held_root, in->error, in->buffer);
        if (result == 0)
                result = bs_thin_superblock_parse(in->buffer, held_root, in->error, &out->superblock);
        if (result == 0)
                result = look_up_device(&sized, &out->superblock, device_id, &out->device);
        out->superblock.metadata_blocks = live.metadata_blocks;

        int again = read_block0(in, block0, &live);

        if (again != 0)
                return again;
        return live.held_root == held_root ? result : bs_fail_range(in->error, not_held);
}

int bs_thin_find(const struct bs_reader *reader, uint64_t held_root, uint64_t device_id,
                 const struct bs_interrupt *interrupt, struct bs_error *error, struct bs_thin_view *out)
{
        const struct timespec wait = {.tv_nsec = TORN_WAIT_NANOSECONDS};
        _cleanup_free_ uint8_t *blocks = bs_alloc_aligned(2 * BS_THIN_BLOCK_SIZE);
        struct lookup in = {.reader = reader, .error = error};
        int torn = 0;

        if (!blocks)
                return -ENOMEM;
        in.buffer = blocks + BS_THIN_BLOCK_SIZE;
        if (reader->size < BS_THIN_BLOCK_SIZE)
                return bs_fail_block(error, 0, "the metadata device is smaller than one block");
        for (int attempt = 0; attempt < COMMIT_ATTEMPTS; attempt++) {
                int result = held_root ? find_held(&in, held_root, device_id, blocks, out)
                                       : find_once(&in, device_id, blocks, out);

                if (result <= 0)
                        return result;
                if (result == SUPERBLOCK_TORN && ++torn == TORN_ATTEMPTS)
                        return -EUCLEAN;
                if (result == SUPERBLOCK_TORN)
                        nanosleep(&wait, NULL);
                result = bs_interrupted(interrupt);
                if (result < 0)
                        return result;
        }
        return bs_fail_call(error, "look-up in a pool that commits all the time", -EAGAIN);
}

int bs_thin_check_unchanged(const struct bs_reader *reader, uint64_t held_root, uint64_t device_id,
                            const struct bs_thin_device *then, const struct bs_interrupt *interrupt,
                            struct bs_error *error)
{
        struct bs_thin_view now;
        int result = bs_thin_find(reader, held_root, device_id, interrupt, error, &now);

        if (result < 0 && result != -ENOKEY)
                return result;
        if (result == -ENOKEY || now.device.root != then->root ||
            now.device.mapped_blocks != then->mapped_blocks ||
            now.device.transaction_id != then->transaction_id ||
            now.device.creation_time != then->creation_time)
                return bs_fail_block(error, then->root, "the device changed while it was read");
        return 0;
}
