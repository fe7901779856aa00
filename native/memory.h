/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only place that allocates.
 *
 * All of it fails by returning NULL, also when the size does not fit a size_t. Whatever these return
 * is released with bs_free().
 */
#ifndef BLOCKSNAP_MEMORY_H
#define BLOCKSNAP_MEMORY_H

#include <stddef.h>

/* Resize `old` (which may be NULL) to `count` items of `size` bytes; on failure `old` stays valid. */
void *bs_realloc(void *old, size_t count, size_t size);

/* `size` bytes of zeros. Pages nobody touches cost nothing, so a sparse bitmap is cheap. */
void *bs_alloc_zeroed(size_t size);

/* `size` bytes whose address suits O_DIRECT on any device; `size` is a multiple of BS_IO_ALIGNMENT. */
void *bs_alloc_aligned(size_t size);

void bs_free(void *pointer);

#ifdef BS_TEST_ALLOCATIONS
/*
 * Let the next `successes` allocations pass and every later one fail; a negative number lets all pass.
 * Only the build that ctest uses has this.
 */
void bs_test_allocations(int successes);
#endif

#endif
