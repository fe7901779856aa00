/* SPDX-License-Identifier: Apache-2.0 */
#include "thin_image.h"

#include "check.h"

enum { MAPPING_ROOT = 1, DETAILS_ROOT = 2 };

void image_poke32(struct image *image, uint64_t block, size_t offset, uint32_t value)
{
        value = htole32(value);
        memcpy(image->blocks[block] + offset, &value, sizeof(value));
}

void image_poke64(struct image *image, uint64_t block, size_t offset, uint64_t value)
{
        value = htole64(value);
        memcpy(image->blocks[block] + offset, &value, sizeof(value));
}

void image_seal(struct image *image, uint64_t block)
{
        uint32_t salt = block ? BS_THIN_NODE_SALT : BS_THIN_SUPERBLOCK_SALT;

        image_poke32(image, block, 0, bs_thin_checksum(image->blocks[block], salt));
}

struct image *image_create(void)
{
        struct image *image = calloc(1, sizeof(*image));

        CHECK(image);
        image_poke64(image, 0, 32, 27022010);
        image_poke32(image, 0, 40, 2);
        image_poke32(image, 0, 44, 5);
        image_poke64(image, 0, 48, 77);
        image_poke64(image, 0, 192, IMAGE_BLOCKS);
        image_poke64(image, 0, 320, MAPPING_ROOT);
        image_poke64(image, 0, 328, DETAILS_ROOT);
        image_poke32(image, 0, 336, 128);
        image_poke32(image, 0, 340, 8);
        image_seal(image, 0);
        image_node(image, MAPPING_ROOT, LEAF, 8);
        image_node(image, DETAILS_ROOT, LEAF, 24);
        return image;
}

void image_destroy(struct image *image)
{
        free(image);
}

static int read_image(void *context, uint64_t offset, void *buffer, size_t length)
{
        struct image *image = context;

        CHECK(offset % BS_THIN_BLOCK_SIZE == 0 && length % BS_THIN_BLOCK_SIZE == 0);
        CHECK((uintptr_t)buffer % BS_IO_ALIGNMENT == 0);
        CHECK(offset + length <= sizeof(image->blocks));
        image->reads++;
        image->last_block = offset / BS_THIN_BLOCK_SIZE;
        if (image->bad_block && offset / BS_THIN_BLOCK_SIZE <= image->bad_block &&
            image->bad_block < (offset + length) / BS_THIN_BLOCK_SIZE)
                return -EIO;
        if (offset == 0 && image->commits > 0) {
                image->commits--;
                image_poke64(image, 0, 48, bs_le64(image->blocks[0] + 48) + 1);
                image_seal(image, 0);
        }
        memcpy(buffer, image->blocks[offset / BS_THIN_BLOCK_SIZE], length);
        if (offset == 0 && image->torn_reads > 0) {
                image->torn_reads--;
                memset((uint8_t *)buffer + 2048, 0xee, 2048);
        }
        if (image->hook)
                image->hook(image);
        return 0;
}

struct bs_reader image_reader(struct image *image, uint64_t blocks)
{
        return (struct bs_reader){
                .read = read_image,
                .context = image,
                .call = "pread",
                .size = blocks * BS_THIN_BLOCK_SIZE,
        };
}

void image_node(struct image *image, uint64_t block, uint32_t kind, uint32_t value_size)
{
        image_poke32(image, block, 4, kind);
        image_poke64(image, block, 8, block);
        image_poke32(image, block, 16, 0);
        image_poke32(image, block, 20, value_size == 8 ? 252 : 126);
        image_poke32(image, block, 24, value_size);
        image_seal(image, block);
}

/* Append a key and return the offset of its value. */
static size_t add_key(struct image *image, uint64_t block, uint64_t key)
{
        const uint8_t *node = image->blocks[block];
        uint32_t count = bs_le32(node + 16);
        uint32_t room = bs_le32(node + 20);

        CHECK(count < room);
        image_poke64(image, block, 32 + 8 * (size_t)count, key);
        image_poke32(image, block, 16, count + 1);
        return 32 + 8 * (size_t)room + bs_le32(node + 24) * (size_t)count;
}

void image_add(struct image *image, uint64_t block, uint64_t key, uint64_t value)
{
        image_poke64(image, block, add_key(image, block, key), value);
        image_seal(image, block);
}

void image_map(struct image *image, uint64_t block, uint64_t chunk, uint32_t time)
{
        image_add(image, block, chunk, (chunk + 1000) << 24 | time);
}

void image_device(struct image *image, uint64_t device_id, uint64_t root, uint64_t mapped_blocks)
{
        image_add(image, MAPPING_ROOT, device_id, root);

        size_t value = add_key(image, DETAILS_ROOT, device_id);

        image_poke64(image, DETAILS_ROOT, value, mapped_blocks);
        image_poke64(image, DETAILS_ROOT, value + 8, 40 + device_id);
        image_poke32(image, DETAILS_ROOT, value + 16, 3);
        image_poke32(image, DETAILS_ROOT, value + 20, 4);
        image_seal(image, DETAILS_ROOT);
}
