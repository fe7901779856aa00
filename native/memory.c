/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#include "io.h"

#include <stdbool.h>
#include <stdlib.h>

#ifdef BS_TEST_ALLOCATIONS
static int allocations_left = -1;

void bs_test_allocations(int successes)
{
        allocations_left = successes;
}

static bool allowed(void)
{
        if (allocations_left < 0)
                return true;
        if (allocations_left == 0)
                return false;
        allocations_left--;
        return true;
}
#else
static bool allowed(void)
{
        return true;
}
#endif

void *bs_realloc(void *old, size_t count, size_t size)
{
        size_t bytes;

        if (__builtin_mul_overflow(count, size, &bytes) || bytes == 0 || !allowed())
                return NULL;
        return realloc(old, bytes);
}

void *bs_alloc_zeroed(size_t size)
{
        /* calloc(0) may be NULL, which would look like a failure. */
        return allowed() ? calloc(1, size ? size : 1) : NULL;
}

void *bs_alloc_aligned(size_t size)
{
        return allowed() ? aligned_alloc(BS_IO_ALIGNMENT, size) : NULL;
}

void bs_free(void *pointer)
{
        free(pointer);
}
