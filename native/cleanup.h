/* SPDX-License-Identifier: Apache-2.0 */
/* Scope guards: a variable so marked is released when it goes out of scope. */
#ifndef BLOCKSNAP_CLEANUP_H
#define BLOCKSNAP_CLEANUP_H

#include "memory.h"

#include <string.h>

static inline void bs_free_pointed(void *variable)
{
        void *pointer;

        /* The variable has another pointer type; copying its bytes keeps strict aliasing happy. */
        memcpy(&pointer, variable, sizeof(pointer));
        bs_free(pointer);
}

#define _cleanup_(function) __attribute__((cleanup(function)))
#define _cleanup_free_ _cleanup_(bs_free_pointed)

#endif
