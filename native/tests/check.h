/* SPDX-License-Identifier: Apache-2.0 */
/* The test harness: a failed check says where and ends the program, so ctest sees it. */
#ifndef BLOCKSNAP_CHECK_H
#define BLOCKSNAP_CHECK_H

#include "memory.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                     \
        do {                                                                                                 \
                if (!(condition)) {                                                                          \
                        fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__,             \
                                #condition);                                                                 \
                        exit(1);                                                                             \
                }                                                                                            \
        } while (0)

#define CHECK_EQUAL(left, right)                                                                             \
        do {                                                                                                 \
                intmax_t left_ = (intmax_t)(left), right_ = (intmax_t)(right);                               \
                if (left_ != right_) {                                                                       \
                        fprintf(stderr, "%s:%d: %s: %s is %jd, not %jd\n", __FILE__, __LINE__, __func__,     \
                                #left, left_, right_);                                                       \
                        exit(1);                                                                             \
                }                                                                                            \
        } while (0)

/* Run `call` with the first, second, ... allocation failing until it succeeds; before that it is -ENOMEM. */
#define CHECK_ALLOCATIONS(call)                                                                              \
        do {                                                                                                 \
                int result_ = -ENOMEM;                                                                       \
                for (int n_ = 0; result_ == -ENOMEM; n_++) {                                                 \
                        CHECK(n_ < 1000);                                                                    \
                        bs_test_allocations(n_);                                                             \
                        result_ = (call);                                                                    \
                }                                                                                            \
                bs_test_allocations(-1);                                                                     \
                CHECK_EQUAL(result_, 0);                                                                     \
        } while (0)

#endif
