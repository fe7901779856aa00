/* SPDX-License-Identifier: Apache-2.0 */
#include "btrfs_send.h"
#include "btrfs_steps.h"
#include "check.h"
#include "send_image.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

static const struct bs_interrupt never = {.check = NULL};

/* A sender of a given stream, many times over if wanted, which then returns `result`. */
struct canned {
        const uint8_t *bytes;
        size_t length;
        size_t piece;
        bool endless;  /* repeat the last command for ever */
        size_t repeat; /* where that begins */
        int result;
        int ended_with;
        unsigned ended;
};

static int write_all(int fd, const uint8_t *bytes, size_t length)
{
        while (length > 0) {
                ssize_t written = write(fd, bytes, length);

                if (written < 0)
                        return -errno;
                bytes += written;
                length -= (size_t)written;
        }
        return 0;
}

static int send_canned(void *context, int fd)
{
        struct canned *canned = context;
        int result = 0;

        for (size_t at = 0; at < canned->length && result == 0; at += canned->piece) {
                size_t left = canned->length - at;

                result = write_all(fd, canned->bytes + at, left < canned->piece ? left : canned->piece);
        }
        while (canned->endless && result == 0)
                result = write_all(fd, canned->bytes + canned->repeat, canned->length - canned->repeat);
        canned->ended_with = result;
        canned->ended++;
        return result < 0 ? result : canned->result;
}

static int ignore(void *context, const struct bs_stream_event *event)
{
        (void)event;
        return ++*(unsigned *)context == 1000000 ? -ECANCELED : 0;
}

static unsigned count_entries(const char *path)
{
        DIR *directory = opendir(path);
        unsigned count = 0;

        CHECK(directory);
        while (readdir(directory))
                count++;
        closedir(directory);
        return count;
}

static int run(struct canned *canned, const struct bs_interrupt *interrupt, struct bs_error *error)
{
        struct bs_sender sender = {.send = send_canned, .context = canned, .call = "the sender"};
        unsigned descriptors = count_entries("/proc/self/fd");
        unsigned threads = count_entries("/proc/self/task");
        unsigned taken = 0;
        uint64_t commands;
        int result;

        canned->ended = 0;
        result = bs_send_run(&sender, ignore, &taken, interrupt, error, &commands);
        CHECK_EQUAL(count_entries("/proc/self/fd"), descriptors);
        CHECK_EQUAL(count_entries("/proc/self/task"), threads);
        if (result == 0)
                CHECK_EQUAL(taken, commands - 1);
        return result;
}

static struct canned of_image(const struct send_image *image)
{
        return (struct canned){.bytes = image->bytes, .length = image->length, .piece = 100};
}

static void test_a_good_stream(void)
{
        struct send_image *image = send_image_of_everything(2);
        struct canned canned = of_image(image);
        struct bs_error error;

        CHECK_EQUAL(run(&canned, &never, &error), 0);
        CHECK_EQUAL(canned.ended, 1);
        CHECK_ALLOCATIONS(run(&canned, &never, &error));
        send_image_destroy(image);
}

static void test_a_sender_that_fails(void)
{
        struct send_image *image = send_image_of_everything(1);
        struct canned canned = of_image(image);
        struct bs_error error;

        /* At once, in the middle of a command, and after all of it: it is the sender's error. */
        for (size_t length = 0; length <= image->length; length += image->length / 2) {
                canned.length = length;
                canned.result = -EAGAIN;
                CHECK_EQUAL(run(&canned, &never, &error), -EAGAIN);
                CHECK(strcmp(error.call, "the sender") == 0);
        }
        /* One that stops early without saying so. */
        canned.length = image->length / 2;
        canned.result = 0;
        CHECK_EQUAL(run(&canned, &never, &error), -EUCLEAN);
        CHECK(strstr(error.reason, "ends early"));
        send_image_destroy(image);
}

/* The sender is in the middle of it, and there is more than the pipe holds. */
static struct canned endless(struct send_image *image)
{
        struct canned canned;

        send_snapshot(image);
        for (int i = 0; i < 1000; i++)
                send_extent(image, "a/file", 0, 4096);
        canned = of_image(image);
        canned.endless = true;
        canned.repeat = image->command;
        return canned;
}

static void test_a_reader_that_fails(void)
{
        struct send_image *image = send_image_create(1);
        struct canned canned = endless(image);
        struct bs_error error;

        image->bytes[image->length - 1] ^= 1;
        CHECK_EQUAL(run(&canned, &never, &error), -EUCLEAN);
        CHECK(strstr(error.reason, "checksum"));
        CHECK_EQUAL(error.block, image->command);
        /* And SIGPIPE, which the program does not ignore, did no harm. */
        CHECK_EQUAL(canned.ended_with, -EPIPE);
        image->bytes[image->length - 1] ^= 1;
        CHECK_EQUAL(run(&canned, &never, &error), -ECANCELED);
        CHECK_EQUAL(canned.ended_with, -EPIPE);
        send_image_destroy(image);
}

static int stop_at_fifth(void *context)
{
        return ++*(int *)context == 5;
}

static void test_an_interrupt(void)
{
        struct send_image *image = send_image_create(1);
        struct canned canned = endless(image);
        struct bs_error error;
        int asked = 0;
        struct bs_interrupt interrupt = {.check = stop_at_fifth, .context = &asked};

        CHECK_EQUAL(run(&canned, &interrupt, &error), -EINTR);
        CHECK_EQUAL(canned.ended_with, -EPIPE);
        send_image_destroy(image);
}

/* A sender that writes nothing until it is asked to stop, as a comparison that finds nothing. */
static int wait_for_the_reader(void *context, int fd)
{
        int *asked = context;
        uint8_t byte = 0;
        int result = 0;

        while (__atomic_load_n(asked, __ATOMIC_RELAXED) < 5)
                usleep(1000);
        while (result == 0)
                result = write_all(fd, &byte, 1);
        return result;
}

static int count_up(void *context)
{
        return __atomic_add_fetch((int *)context, 1, __ATOMIC_RELAXED) >= 5;
}

static void test_an_interrupt_while_nothing_comes(void)
{
        int asked = 0;
        struct bs_sender sender = {.send = wait_for_the_reader, .context = &asked, .call = "wait"};
        struct bs_interrupt interrupt = {.check = count_up, .context = &asked};
        struct bs_error error;
        unsigned taken = 0;
        uint64_t commands;

        CHECK_EQUAL(bs_send_run(&sender, ignore, &taken, &interrupt, &error, &commands), -EINTR);
        CHECK_EQUAL(taken, 0);
}

/* Which signals the sender's thread does not get. */
static int look_at_signals(void *context, int fd)
{
        (void)fd;
        return -pthread_sigmask(SIG_SETMASK, NULL, context);
}

static void test_signals_are_for_the_caller(void)
{
        sigset_t blocked;
        sigset_t before;
        struct bs_sender sender = {.send = look_at_signals, .context = &blocked, .call = "look"};
        struct bs_error error;
        unsigned taken = 0;
        uint64_t commands;

        sigemptyset(&blocked);
        CHECK_EQUAL(bs_send_run(&sender, ignore, &taken, &never, &error, &commands), -EUCLEAN);
        CHECK(sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGTERM));
        CHECK(sigismember(&blocked, SIGPIPE) && sigismember(&blocked, SIGALRM));
        pthread_sigmask(SIG_SETMASK, NULL, &before);
        CHECK(!sigismember(&before, SIGINT) && !sigismember(&before, SIGPIPE));
}

static void test_the_kernel_refuses_what_is_not_btrfs(void)
{
        struct bs_send_request request = {.subvolume = open("/proc", O_RDONLY | O_CLOEXEC), .version = 2};
        struct bs_sender sender;
        struct bs_error error;
        unsigned taken = 0;
        uint64_t commands;

        CHECK(request.subvolume >= 0);
        bs_kernel_sender_init(&request, &sender);
        CHECK_EQUAL(bs_send_run(&sender, ignore, &taken, &never, &error, &commands), -ENOTTY);
        CHECK(strcmp(error.call, "BTRFS_IOC_SEND") == 0);
        close(request.subvolume);
}

int main(void)
{
        test_a_good_stream();
        test_a_sender_that_fails();
        test_a_reader_that_fails();
        test_an_interrupt();
        test_an_interrupt_while_nothing_comes();
        test_signals_are_for_the_caller();
        test_the_kernel_refuses_what_is_not_btrfs();
        return 0;
}
