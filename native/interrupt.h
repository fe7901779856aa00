/* SPDX-License-Identifier: Apache-2.0 */
/* How a caller stops a long scan: it is asked between batches of work. */
#ifndef BLOCKSNAP_INTERRUPT_H
#define BLOCKSNAP_INTERRUPT_H

#include <errno.h>
#include <stddef.h>

/* Return 0 to go on, anything else to stop; the scan then returns -EINTR. */
typedef int (*bs_interrupt_fn)(void *context);

struct bs_interrupt {
        bs_interrupt_fn check; /* NULL: never stop */
        void *context;
};

static inline int bs_interrupted(const struct bs_interrupt *interrupt)
{
        return interrupt->check && interrupt->check(interrupt->context) ? -EINTR : 0;
}

#endif
