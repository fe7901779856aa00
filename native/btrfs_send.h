/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What changed between two read-only btrfs snapshots, as the kernel's own comparison says (BTRFS_IOC_SEND).
 *
 * The kernel walks both trees, leaves out what they share, and writes a stream that tells how to make the
 * later snapshot of the earlier one; without the data of files, but with every range that differs. A
 * thread of its own is in the ioctl, and the calling thread takes the stream out of the pipe.
 */
#ifndef BLOCKSNAP_BTRFS_SEND_H
#define BLOCKSNAP_BTRFS_SEND_H

#include "btrfs_stream.h"
#include "interrupt.h"

/*
 * What writes a stream: the kernel, or something else in tests. `send` writes to `fd` until it is done, and
 * returns 0 or -errno; -EPIPE when nobody reads any more. It runs in a thread that gets no signals.
 * `call` names it in errors.
 */
struct bs_sender {
        int (*send)(void *context, int fd);
        void *context;
        const char *call;
};

/* One comparison; `subvolume` and `parent_tree` are both of read-only snapshots on one filesystem. */
struct bs_send_request {
        int subvolume;        /* descriptor of the later snapshot's top directory */
        uint64_t parent_tree; /* id of the earlier snapshot's tree; 0: none, all of the later one is new */
        uint32_t version;     /* of the stream: 1 or 2 */
};

/* A sender that asks the kernel; the request outlives it. */
void bs_kernel_sender_init(struct bs_send_request *request, struct bs_sender *out);

/*
 * Run a sender and hand the commands of its stream to `take`, in this thread. Whatever happens, the sender's
 * thread has ended and the pipe is closed when this returns; after an interrupt, or when `take` refuses, that
 * is when the kernel next writes. One error is reported: that of the side that failed first. -EUCLEAN is for
 * a stream that makes no sense; `commands` is how many there were.
 */
int bs_send_run(const struct bs_sender *sender, bs_stream_fn take, void *context,
                const struct bs_interrupt *interrupt, struct bs_error *error, uint64_t *commands);

#endif
