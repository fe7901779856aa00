/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compare two trees that anybody may have made up, and hold the answer against a walk of both.
 *
 * The input describes nodes, so that nearly every mutation is another pair of trees; what the bytes of a
 * block may be is fuzz_thin's business. Where both trees are sound the answer has to be exactly theirs, and
 * where one is not, a refusal or an answer that is sorted, merged and within the bounds that were asked for.
 *
 *     byte 0      options
 *     byte 1, 2   root of the base, of the device
 *     byte 3, 4   what is added to the numbers of mappings on record
 *     then nodes  kind and number of entries; for each entry a step from the key before, and a value
 */
#include "cleanup.h"
#include "thin_diff.h"

#include <stdlib.h>

enum {
        /* Options. */
        HAS_BASE = 1,
        SWAPPED = 2,
        CLIPPED = 4,

        BLOCKS = 64,
        FIRST_NODE = 3, /* behind superblock and the leaves of the two upper trees */
        MAX_ENTRIES = 31,
        LEAF = 0x20,
        LARGE_STEP = 0xff,

        MAX_MAPPINGS = BLOCKS * MAX_ENTRIES,
        CLIP_FIRST = 20,
        CLIP_END = 300,
};

struct node {
        bool exists;
        bool leaf;
        unsigned count;
        uint64_t keys[MAX_ENTRIES];
        uint64_t values[MAX_ENTRIES];
};

struct mapping {
        uint64_t chunk;
        uint64_t block;
};

/* What a walk finds, in order. */
struct content {
        bool sound;
        size_t count;
        struct mapping mappings[MAX_MAPPINGS];
};

struct input {
        const uint8_t *data;
        size_t left;
};

static uint8_t take(struct input *input)
{
        if (input->left == 0)
                return 0;
        input->left--;
        return *input->data++;
}

static uint64_t take_block(struct input *input)
{
        return FIRST_NODE + take(input) % (BLOCKS - FIRST_NODE);
}

static void take_nodes(struct input *input, struct node nodes[BLOCKS])
{
        for (size_t block = FIRST_NODE; block < BLOCKS && input->left > 0; block++) {
                struct node *node = &nodes[block];
                uint8_t head = take(input);
                uint64_t key = 0;

                node->exists = true;
                node->leaf = head & LEAF;
                node->count = head % (MAX_ENTRIES + 1);
                for (unsigned i = 0; i < node->count; i++) {
                        uint8_t step = take(input);

                        key += step == LARGE_STEP ? UINT64_C(1) << 62 : step;
                        node->keys[i] = key;
                        node->values[i] = node->leaf ? take(input) : take_block(input);
                }
        }
}

/* Walk a tree of the description, by the rules of the format and no code of the core. */
static void walk(const struct node nodes[BLOCKS], uint64_t block, uint64_t low, uint64_t last, unsigned depth,
                 struct content *out)
{
        const struct node *node = &nodes[block];

        out->sound &= node->exists && depth < BLOCKS && (node->leaf || node->count > 0);
        for (unsigned i = 0; i < node->count && out->sound; i++)
                out->sound = node->keys[i] >= low && node->keys[i] <= last &&
                             (i == 0 || node->keys[i] > node->keys[i - 1]);
        for (unsigned i = 0; i < node->count && out->sound; i++) {
                if (node->leaf)
                        /* Two bits of time, the rest is the data block. */
                        out->mappings[out->count++] =
                                (struct mapping){.chunk = node->keys[i], .block = node->values[i] >> 2};
                else
                        walk(nodes, node->values[i], node->keys[i],
                             i + 1 < node->count ? node->keys[i + 1] - 1 : last, depth + 1, out);
        }
}

static void store(uint8_t *block, size_t at, uint64_t value, size_t size)
{
        value = htole64(value);
        memcpy(block + at, &value, size);
}

static void store_node(uint8_t *image, uint64_t number, bool leaf, unsigned count, uint32_t value_size)
{
        uint8_t *block = image + number * BS_THIN_BLOCK_SIZE;

        store(block, 4, leaf ? 2 : 1, 4);
        store(block, 8, number, 8);
        store(block, 16, count, 4);
        store(block, 20, value_size == 8 ? 252 : 126, 4);
        store(block, 24, value_size, 4);
}

static void seal(uint8_t *image, uint64_t number, uint32_t salt)
{
        uint8_t *block = image + number * BS_THIN_BLOCK_SIZE;

        store(block, 0, bs_thin_checksum(block, salt), 4);
}

static void store_pool(uint8_t *image, const uint64_t roots[2], const uint64_t mapped[2])
{
        uint8_t *upper = image + BS_THIN_BLOCK_SIZE;
        uint8_t *details = image + 2 * BS_THIN_BLOCK_SIZE;

        store(image, 32, 27022010, 8);
        store(image, 40, 2, 4);
        store(image, 44, 3, 4);
        store(image, 192, BLOCKS, 8);
        store(image, 320, 1, 8);
        store(image, 328, 2, 8);
        store(image, 336, 128, 4);
        store(image, 340, 8, 4);
        store_node(image, 1, true, 2, 8);
        store_node(image, 2, true, 2, 24);
        for (size_t i = 0; i < 2; i++) {
                store(upper, 32 + 8 * i, 1 + i, 8);
                store(upper, 32 + 8 * 252 + 8 * i, roots[i], 8);
                store(details, 32 + 8 * i, 1 + i, 8);
                store(details, 32 + 8 * 126 + 24 * i, mapped[i], 8);
        }
        seal(image, 0, BS_THIN_SUPERBLOCK_SALT);
        seal(image, 1, BS_THIN_NODE_SALT);
        seal(image, 2, BS_THIN_NODE_SALT);
}

static void store_nodes(uint8_t *image, const struct node nodes[BLOCKS])
{
        for (uint64_t number = FIRST_NODE; number < BLOCKS && nodes[number].exists; number++) {
                const struct node *node = &nodes[number];
                uint8_t *block = image + number * BS_THIN_BLOCK_SIZE;

                store_node(image, number, node->leaf, node->count, 8);
                for (unsigned i = 0; i < node->count; i++) {
                        uint64_t value = node->values[i];

                        if (node->leaf)
                                value = value >> 2 << 24 | (value & 3);
                        store(block, 32 + 8 * (size_t)i, node->keys[i], 8);
                        store(block, 32 + 8 * 252 + 8 * (size_t)i, value, 8);
                }
                seal(image, number, BS_THIN_NODE_SALT);
        }
}

static int read_image(void *context, uint64_t offset, void *buffer, size_t length)
{
        memcpy(buffer, (const uint8_t *)context + offset, length);
        return 0;
}

/* Append one chunk to what is expected. */
static void expect(struct bs_extents *list, const struct bs_thin_diff *request, uint64_t chunk)
{
        if (chunk >= request->first_chunk && chunk < request->end_chunk &&
            bs_extents_append(list, chunk * 65536, 65536) < 0)
                abort();
}

static void expect_difference(const struct content *base, const struct content *device,
                              const struct bs_thin_diff *request, struct bs_extents *changed,
                              struct bs_extents *discarded)
{
        size_t i = 0, j = 0;

        while (i < base->count || j < device->count) {
                const struct mapping *was = i < base->count ? &base->mappings[i] : NULL;
                const struct mapping *is = j < device->count ? &device->mappings[j] : NULL;

                if (!is || (was && was->chunk < is->chunk)) {
                        expect(discarded, request, was->chunk);
                        i++;
                } else if (!was || is->chunk < was->chunk) {
                        expect(changed, request, is->chunk);
                        j++;
                } else {
                        if (was->block != is->block)
                                expect(changed, request, is->chunk);
                        i++;
                        j++;
                }
        }
}

static void require_equal(const struct bs_extents *found, const struct bs_extents *expected)
{
        if (found->count != expected->count ||
            (found->count && memcmp(found->items, expected->items, found->count * sizeof(*found->items))))
                abort();
}

/* What has to hold of any answer. */
static void check_answer(const struct bs_thin_diff *request, const struct bs_extents *list)
{
        uint64_t end = 0;

        for (size_t i = 0; i < list->count; i++) {
                const struct bs_extent *item = &list->items[i];

                if (item->length == 0 || item->offset % 65536 || item->length % 65536 ||
                    (i > 0 && item->offset <= end) || item->offset / 65536 < request->first_chunk)
                        abort();
                end = item->offset + item->length;
        }
        if (end > request->end_chunk * 65536)
                abort();
}

static void compare(uint8_t *image, const struct bs_thin_diff *request, const struct content *base,
                    const struct content *device)
{
        const struct bs_interrupt never = {.check = NULL};
        const struct bs_reader reader = {
                .read = read_image,
                .context = image,
                .call = "read_image",
                .size = BLOCKS * BS_THIN_BLOCK_SIZE,
        };
        _cleanup_(bs_thin_diff_result_deinit) struct bs_thin_diff_result result;
        _cleanup_(bs_extents_deinit) struct bs_extents changed = {.items = NULL};
        _cleanup_(bs_extents_deinit) struct bs_extents discarded = {.items = NULL};
        struct bs_error error = {.call = NULL};
        uint64_t missing;
        int status = bs_thin_diff(&reader, request, &never, &error, &missing, &result);
        bool sound = base->sound && device->sound;

        if (status < 0 && status != -EUCLEAN)
                abort();
        if (status < 0) {
                if (sound && !strstr(error.reason, "differ by as many mappings"))
                        abort();
                return;
        }
        check_answer(request, &result.changed);
        check_answer(request, &result.discarded);
        if (!sound)
                return;
        expect_difference(base, device, request, &changed, &discarded);
        require_equal(&result.changed, &changed);
        require_equal(&result.discarded, &discarded);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        static const struct content nothing = {.sound = true};
        _cleanup_free_ struct content *contents = bs_alloc_zeroed(2 * sizeof(*contents));
        _cleanup_free_ uint8_t *image = bs_alloc_zeroed(BLOCKS * BS_THIN_BLOCK_SIZE);
        struct input input = {.data = data, .left = size};
        struct node nodes[BLOCKS] = {{.exists = false}};
        uint8_t options = take(&input);
        uint64_t roots[2] = {take_block(&input), take_block(&input)};
        uint64_t mapped[2] = {take(&input), take(&input)};

        if (!contents || !image)
                abort();
        take_nodes(&input, nodes);
        for (size_t i = 0; i < 2; i++) {
                contents[i].sound = true;
                walk(nodes, roots[i], 0, UINT64_MAX, 0, &contents[i]);
                mapped[i] += contents[i].count;
        }
        store_pool(image, roots, mapped);
        store_nodes(image, nodes);

        size_t later = options & SWAPPED ? 0 : 1;
        bool has_base = options & HAS_BASE;
        struct bs_thin_diff request = {
                .base_id = has_base ? 2 - later : BS_THIN_NO_DEVICE,
                .device_id = 1 + later,
                .first_chunk = options & CLIPPED ? CLIP_FIRST : 0,
                .end_chunk = options & CLIPPED ? CLIP_END : UINT64_MAX / 65536,
        };

        compare(image, &request, has_base ? &contents[1 - later] : &nothing, &contents[later]);
        return 0;
}
