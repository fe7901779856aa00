/* SPDX-License-Identifier: Apache-2.0 */
#include "watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

uint64_t bs_watch_now_ms(void)
{
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void bs_watch_send(struct bs_watch *watch, enum bs_watch_word word, uint32_t item, int32_t value)
{
        struct bs_watch_message message = {.word = word, .item = item, .value = value};

        /* Whoever does not read it is stopped or gone, and must not stop us too. */
        if (!watch->alone)
                (void)send(watch->control, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void close_end(int *fd)
{
        if (*fd >= 0)
                close(*fd);
        *fd = -1;
}

static int wire(const struct bs_watch_item *item, posix_spawn_file_actions_t *actions)
{
        int r, out = item->answer >= 0 ? item->answer : item->output;

        if (item->kind == BS_WATCH_SESSION)
                r = posix_spawn_file_actions_adddup2(actions, item->fd, 0);
        else
                r = posix_spawn_file_actions_addopen(actions, 0, "/dev/null", O_RDONLY, 0);
        if (r == 0)
                r = posix_spawn_file_actions_adddup2(actions, out, 1);
        if (r == 0)
                r = posix_spawn_file_actions_adddup2(actions, item->output, 2);
        return r;
}

/* Nothing that we block or ignore is blocked or ignored in a command, and it leads a session of its own. */
static int set_free(posix_spawnattr_t *attributes)
{
        sigset_t none, all;
        int r;

        sigemptyset(&none);
        sigfillset(&all);
        r = posix_spawnattr_setsigmask(attributes, &none);
        if (r == 0)
                r = posix_spawnattr_setsigdefault(attributes, &all);
        if (r == 0)
                r = posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF |
                                                                 POSIX_SPAWN_SETSID);
        return r;
}

int bs_watch_start(struct bs_watch *watch, struct bs_watch_item *item, const char *phase)
{
        posix_spawn_file_actions_t actions;
        posix_spawnattr_t attributes;
        uint32_t number = (uint32_t)(item - watch->items);
        int r;

        if (item->started || !item->argv)
                return -EALREADY;
        item->started = true;
        setenv("BLOCKSNAP_PHASE", phase, 1);
        setenv("BLOCKSNAP_RELEASED_BY", watch->why ? "watchdog" : "controller", 1);
        if (posix_spawn_file_actions_init(&actions) != 0)
                return -ENOMEM;
        if (posix_spawnattr_init(&attributes) != 0) {
                posix_spawn_file_actions_destroy(&actions);
                return -ENOMEM;
        }
        r = wire(item, &actions);
        if (r == 0)
                r = set_free(&attributes);
        if (r == 0)
                r = posix_spawn(&item->pid, item->argv[0], &actions, &attributes, item->argv, environ);
        posix_spawnattr_destroy(&attributes);
        posix_spawn_file_actions_destroy(&actions);
        /* These are the command's ends now: nobody reads an end of file while we hold them too. */
        close_end(&item->answer);
        if (item->kind == BS_WATCH_SESSION)
                close_end(&item->fd);
        if (r != 0) {
                item->pid = 0;
                /* 127 is what a shell says of a command that it cannot start. */
                dprintf(item->output, "%s: %s\n", item->argv[0], strerror(r));
                bs_watch_send(watch, BS_WATCH_ENDED, number, 127);
                return -r;
        }
        if (item->kind == BS_WATCH_AFTER)
                item->term_at_ms = bs_watch_now_ms() + (item->limit_ms ? item->limit_ms : watch->limit_ms);
        return 0;
}

static bool reads_as(int fd, const char *text)
{
        char found[64];
        ssize_t got = pread(fd, found, sizeof(found), 0);
        size_t length = strlen(text);

        return got >= 0 && (size_t)got >= length && memcmp(found, text, length) == 0;
}

void bs_watch_let_go(struct bs_watch_item *item)
{
        size_t length;

        /* Commands are started and ended elsewhere, and a connection that is shut down stays so. */
        item->pending = false;
        if (item->kind == BS_WATCH_THAW) {
                item->failure = ioctl(item->fd, FITHAW, 0) < 0 ? errno : 0;
                /* Not frozen; but a freeze that was asked for may still be under way, and succeed later. */
                item->pending = item->failure == EINVAL;
                if (item->pending)
                        item->failure = 0;
        } else if (item->kind == BS_WATCH_WRITE) {
                length = strlen(item->text);
                item->pending = reads_as(item->fd, item->text);
                item->failure = pwrite(item->fd, item->text, length, 0) < 0 ? errno : 0;
                /* The control group was removed, with all that was in it. */
                if (item->failure == ENODEV)
                        item->failure = 0;
        } else if (item->kind == BS_WATCH_HANGUP) {
                /* Closing our copy would not do: the controller that does not run still has its own. */
                item->failure = shutdown(item->fd, SHUT_RDWR) < 0 ? errno : 0;
                /* The server was first. */
                if (item->failure == ENOTCONN)
                        item->failure = 0;
        }
}

void bs_watch_tell_end(struct bs_watch_item *item)
{
        static const char end[] = "end\n";

        if (item->tell >= 0)
                (void)!write(item->tell, end, sizeof(end) - 1);
        close_end(&item->tell);
}

static struct bs_watch_item *running(struct bs_watch *watch, pid_t pid)
{
        for (uint32_t i = 0; i < watch->count; i++)
                if (watch->items[i].pid == pid)
                        return &watch->items[i];
        return NULL;
}

void bs_watch_reap(struct bs_watch *watch)
{
        for (;;) {
                siginfo_t info = {0};
                struct bs_watch_item *item;

                if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 || info.si_pid == 0)
                        return;
                item = running(watch, info.si_pid);
                /* What a session leaves behind may hold what it locked. Its number is taken until it is
                 * waited for, so nobody else can be meant. */
                if (item && (item->kind == BS_WATCH_SESSION || item->kill_at_ms))
                        kill(-info.si_pid, SIGKILL);
                waitpid(info.si_pid, NULL, 0);
                if (!item)
                        continue;
                item->pid = 0;
                item->term_at_ms = item->kill_at_ms = 0;
                if (item->limit_ms && (info.si_code != CLD_EXITED || info.si_status != 0))
                        item->failure = ECANCELED;
                bs_watch_send(watch, BS_WATCH_ENDED, (uint32_t)(item - watch->items),
                              info.si_code == CLD_EXITED ? info.si_status : -info.si_status);
        }
}

void bs_watch_record(struct bs_watch *watch)
{
        char line[512];
        uint32_t failed = 0;
        int length;

        for (uint32_t i = 0; i < watch->count; i++)
                failed += watch->items[i].armed && watch->items[i].failure != 0;
        length = snprintf(
                line, sizeof(line),
                "\n{\"step\": \"released\", \"by\": \"watchdog\", \"why\": \"%s\", \"after_ms\": %d, "
                "\"failed\": %u}\n",
                watch->why ? watch->why : "nothing stood still yet", watch->took_ms, failed);
        if (watch->journal < 0 || length < 0 || (size_t)length >= sizeof(line))
                return;
        if (write(watch->journal, line, (size_t)length) == length)
                fdatasync(watch->journal);
}
