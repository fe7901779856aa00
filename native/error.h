/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Why something failed, beside the -errno that every function returns.
 *
 *   -EUCLEAN  metadata that makes no sense: `block` and `reason` are set
 *   -ERANGE   an argument the metadata contradicts: `reason` is set
 *   -ENOKEY   the pool has no such device: nothing is set
 *   -EINTR    the caller's interrupt function asked to stop: nothing is set
 *   other     a system call failed and `call` names it, or -ENOMEM
 *
 * Strings are literals, nobody frees them.
 */
#ifndef BLOCKSNAP_ERROR_H
#define BLOCKSNAP_ERROR_H

#include <errno.h>
#include <stdint.h>

struct bs_error {
        const char *call;
        const char *reason;
        uint64_t block;
};

/* Remember that `call` failed; `result` is a negative errno and is returned. */
static inline int bs_fail_call(struct bs_error *error, const char *call, int result)
{
        *error = (struct bs_error){.call = call};
        return result;
}

/* Remember what is wrong with a metadata block. */
static inline int bs_fail_block(struct bs_error *error, uint64_t block, const char *reason)
{
        *error = (struct bs_error){.reason = reason, .block = block};
        return -EUCLEAN;
}

/* Remember what is wrong with an argument. */
static inline int bs_fail_range(struct bs_error *error, const char *reason)
{
        *error = (struct bs_error){.reason = reason};
        return -ERANGE;
}

#endif
