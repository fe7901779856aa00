/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BLOCKSNAP_ACCOUNT_H
#define BLOCKSNAP_ACCOUNT_H

#include <sys/types.h>

/*
 * Make `uid` the effective user of the calling thread alone; its real and saved user stay, and with them the
 * way back, and it keeps its capabilities: a socket is found wherever root would find it. The setresuid(2) of
 * the C library would change every thread of the process, and others may be writing files meanwhile. What is
 * connected to a Unix socket until then is `uid` to the other side (SO_PEERCRED, unix(7)). Returns 0 or
 * -errno.
 */
int bs_act_as(uid_t uid);

#endif
