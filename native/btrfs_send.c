/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_send.h"

#include "cleanup.h"

#include <fcntl.h>
#include <linux/btrfs.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
        PIPE_SIZE = 1 << 20,
        BUFFER_SIZE = 256 << 10,
        /* A signal that comes just before the wait is seen after this long. */
        WAIT_MILLISECONDS = 100,
        /* Not in the headers of Linux 6.0 and older, where the kernel refuses it. */
        SEND_FLAG_VERSION = 0x8,
};

/* What the two threads share. Each end of the pipe belongs to one of them; the result is read after the join.
 */
struct exchange {
        const struct bs_sender *sender;
        int write_end;
        int result;
};

static void close_descriptor(int *fd)
{
        if (*fd >= 0)
                close(*fd);
        *fd = -1;
}

static void *run_sender(void *context)
{
        struct exchange *exchange = context;

        exchange->result = exchange->sender->send(exchange->sender->context, exchange->write_end);
        /* The reader sees the end only when nobody can write any more. */
        close_descriptor(&exchange->write_end);
        return NULL;
}

/* Start the thread with all signals blocked: SIGPIPE would end the program, others are for its own threads.
 */
static int start(struct exchange *exchange, pthread_t *out)
{
        sigset_t all;
        sigset_t before;

        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);

        int result = -pthread_create(out, NULL, run_sender, exchange);

        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return result;
}

/* Wait until there is something to read, or a while. */
static int wait_readable(int fd)
{
        struct pollfd wanted = {.fd = fd, .events = POLLIN};
        int count = poll(&wanted, 1, WAIT_MILLISECONDS);

        return count < 0 && errno != EINTR ? -errno : count > 0;
}

/* Take all out of the pipe. */
static int drain(int fd, struct bs_stream *stream, const struct bs_interrupt *interrupt,
                 struct bs_error *error)
{
        _cleanup_free_ uint8_t *buffer = bs_realloc(NULL, BUFFER_SIZE, 1);

        if (!buffer)
                return -ENOMEM;
        for (;;) {
                int result = bs_interrupted(interrupt);

                if (result == 0)
                        result = wait_readable(fd);
                if (result < 0)
                        return result == -EINTR ? result : bs_fail_call(error, "poll", result);
                if (result == 0)
                        continue;

                ssize_t got = read(fd, buffer, BUFFER_SIZE);

                if (got == 0)
                        return 0;
                if (got < 0 && errno == EINTR)
                        continue;
                if (got < 0)
                        return bs_fail_call(error, "read", -errno);
                result = bs_stream_push(stream, buffer, (size_t)got);
                if (result < 0)
                        return result;
        }
}

/* The part of bs_send_run() with the thread; `ends` are those of the pipe, and are closed. */
static int exchange_stream(const struct bs_sender *sender, int ends[2], struct bs_stream *stream,
                           const struct bs_interrupt *interrupt)
{
        struct exchange exchange = {.sender = sender, .write_end = ends[1]};
        pthread_t thread;
        int result = start(&exchange, &thread);

        if (result < 0) {
                close_descriptor(&ends[0]);
                close_descriptor(&ends[1]);
                return bs_fail_call(stream->error, "pthread_create", result);
        }
        result = drain(ends[0], stream, interrupt, stream->error);
        /* If the sender is still writing, this makes it fail with EPIPE. */
        close_descriptor(&ends[0]);
        pthread_join(thread, NULL);
        if (result < 0)
                return result;
        if (exchange.result < 0)
                return bs_fail_call(stream->error, sender->call, exchange.result);
        return bs_stream_finish(stream);
}

int bs_send_run(const struct bs_sender *sender, bs_stream_fn take, void *context,
                const struct bs_interrupt *interrupt, struct bs_error *error, uint64_t *commands)
{
        _cleanup_(bs_stream_deinit) struct bs_stream stream;
        int ends[2];
        int result = bs_stream_init(&stream, take, context, error);

        *commands = 0;
        if (result < 0)
                return result;
        if (pipe2(ends, O_CLOEXEC) < 0)
                return bs_fail_call(error, "pipe2", -errno);
        /* Fewer changes of threads; it works as well when that is not allowed. */
        fcntl(ends[1], F_SETPIPE_SZ, PIPE_SIZE);
        result = exchange_stream(sender, ends, &stream, interrupt);
        *commands = stream.commands;
        return result;
}

/* As struct btrfs_ioctl_send_args, in which older headers do not name the version. */
struct send_arguments {
        int64_t fd;
        uint64_t clone_source_count;
        uint64_t clone_sources;
        uint64_t parent_tree;
        uint64_t flags;
        uint32_t version;
        uint8_t reserved[28];
};

_Static_assert(sizeof(struct send_arguments) == sizeof(struct btrfs_ioctl_send_args),
               "the layout of BTRFS_IOC_SEND's argument");

static int send_by_kernel(void *context, int fd)
{
        const struct bs_send_request *request = context;
        struct send_arguments arguments = {
                .fd = fd,
                .parent_tree = request->parent_tree,
                .flags = BTRFS_SEND_FLAG_NO_FILE_DATA,
        };

        if (request->version > 1) {
                arguments.flags |= SEND_FLAG_VERSION;
                arguments.version = request->version;
        }
        return ioctl(request->subvolume, BTRFS_IOC_SEND, &arguments) < 0 ? -errno : 0;
}

void bs_kernel_sender_init(struct bs_send_request *request, struct bs_sender *out)
{
        *out = (struct bs_sender){
                .send = send_by_kernel,
                .context = request,
                .call = "BTRFS_IOC_SEND",
        };
}
