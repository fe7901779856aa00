/* SPDX-License-Identifier: Apache-2.0 */
#include "watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <syslog.h>
#include <unistd.h>

static void keep_to_ourselves(int fd)
{
        if (fd >= 0)
                (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
}

int bs_watch_prepare(struct bs_watch *watch)
{
        volatile char stack[64 << 10];
        sigset_t set;

        /* Whoever stops the controller's unit signals all its processes; we end when there is no need of us.
         */
        sigfillset(&set);
        if (sigprocmask(SIG_BLOCK, &set, NULL) < 0)
                return -errno;
        sigemptyset(&set);
        sigaddset(&set, SIGCHLD);
        watch->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
        if (watch->signals < 0)
                return -errno;
        keep_to_ourselves(watch->control);
        keep_to_ourselves(watch->journal);
        for (uint32_t i = 0; i < watch->count; i++) {
                keep_to_ourselves(watch->items[i].fd);
                keep_to_ourselves(watch->items[i].answer);
                keep_to_ourselves(watch->items[i].tell);
                keep_to_ourselves(watch->items[i].output);
        }
        if (chdir("/") < 0)
                return -errno;
        for (size_t i = 0; i < sizeof(stack); i += 1024)
                stack[i] = 0;
        /* Whoever may freeze a filesystem may also do this. */
        if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0 && errno != EPERM && errno != ENOMEM)
                return -errno;
        return 0;
}

static bool anything_runs(const struct bs_watch *watch)
{
        for (uint32_t i = 0; i < watch->count; i++)
                if (watch->items[i].pid != 0)
                        return true;
        return false;
}

static bool anything_in_force(const struct bs_watch *watch)
{
        for (uint32_t i = 0; i < watch->count; i++)
                if (watch->items[i].armed || watch->items[i].pid != 0)
                        return true;
        return false;
}

/* Return the `before` in front of an `after` while it runs, else NULL. */
static struct bs_watch_item *running_before(struct bs_watch *watch, uint32_t after)
{
        struct bs_watch_item *before = after > 0 ? &watch->items[after - 1] : NULL;

        return before && before->kind == BS_WATCH_BEFORE && before->pid != 0 ? before : NULL;
}

/* Run the `after` that were asked for, or are in force while all is let go, and whose `before` has ended. */
static void start_afters(struct bs_watch *watch)
{
        for (uint32_t i = watch->count; i-- > 0;) {
                struct bs_watch_item *item = &watch->items[i];

                if (item->kind != BS_WATCH_AFTER || item->started || running_before(watch, i))
                        continue;
                if (item->wanted || (watch->why && item->armed))
                        bs_watch_start(watch, item, "after");
        }
}

/* End a command at a time, unless that is under way or comes sooner. */
static void end_command(struct bs_watch_item *item, uint64_t at_ms)
{
        if (item->pid != 0 && !item->kill_at_ms && (!item->term_at_ms || at_ms < item->term_at_ms))
                item->term_at_ms = at_ms;
}

static void let_kind_go(struct bs_watch *watch, enum bs_watch_kind kind)
{
        for (uint32_t i = watch->count; i-- > 0;)
                if (watch->items[i].armed && watch->items[i].kind == kind)
                        bs_watch_let_go(&watch->items[i]);
}

/*
 * Let everything go. What takes no time goes first. A filesystem may make us wait, when it is being frozen
 * right now and writes out what is dirty, so it is the last.
 */
static void let_all_go(struct bs_watch *watch, const char *why)
{
        uint64_t now = bs_watch_now_ms();

        if (!watch->why) {
                watch->why = why;
                watch->took_ms = watch->began_ms ? (int)(now - watch->began_ms) : 0;
        }
        /* Said first: whoever finds a connection shut down then knows by whom. */
        bs_watch_send(watch, BS_WATCH_EXPIRED, 0, watch->took_ms);
        let_kind_go(watch, BS_WATCH_WRITE);
        let_kind_go(watch, BS_WATCH_HANGUP);
        for (uint32_t i = watch->count; i-- > 0;) {
                struct bs_watch_item *item = &watch->items[i];

                if (item->pid == 0 || item->term_at_ms || item->kill_at_ms)
                        continue;
                if (item->kind == BS_WATCH_SESSION) {
                        bs_watch_tell_end(item);
                        end_command(item, now + BS_WATCH_GRACE_MS);
                } else if (item->kind == BS_WATCH_BEFORE) {
                        end_command(item, now);
                }
        }
        start_afters(watch);
        let_kind_go(watch, BS_WATCH_THAW);
}

/* Try again what was not begun yet, as long as somebody may be beginning it; return when to look again. */
static uint64_t try_again(struct bs_watch *watch, uint64_t now)
{
        uint64_t next = 0;

        for (uint32_t i = 0; watch->why && !watch->alone && i < watch->count; i++) {
                struct bs_watch_item *item = &watch->items[i];

                if (!item->armed || !item->pending)
                        continue;
                bs_watch_let_go(item);
                if (item->pending)
                        next = now + BS_WATCH_RETRY_MS;
        }
        return next;
}

/* End the commands whose time is up; return when to look again, 0 for never. */
static uint64_t press(struct bs_watch *watch, uint64_t now)
{
        uint64_t next = 0;

        for (uint32_t i = 0; i < watch->count; i++) {
                struct bs_watch_item *item = &watch->items[i];
                uint64_t at;

                if (item->pid == 0)
                        continue;
                if (item->kill_at_ms && now >= item->kill_at_ms) {
                        kill(-item->pid, SIGKILL);
                        /* It may wait for a device, and go when that answers. */
                        item->kill_at_ms = now + BS_WATCH_GRACE_MS;
                } else if (item->term_at_ms && now >= item->term_at_ms) {
                        kill(-item->pid, SIGTERM);
                        kill(-item->pid, SIGCONT);
                        item->term_at_ms = 0;
                        item->kill_at_ms = now + BS_WATCH_GRACE_MS;
                }
                at = item->kill_at_ms ? item->kill_at_ms : item->term_at_ms;
                if (at && (!next || at < next))
                        next = at;
        }
        return next;
}

static void start(struct bs_watch *watch, uint32_t number)
{
        struct bs_watch_item *item = &watch->items[number], *before = running_before(watch, number);

        if (item->kind == BS_WATCH_AFTER) {
                /* What `before` does then, `after` would not undo: it has to be gone. */
                if (before)
                        end_command(before, bs_watch_now_ms());
                item->wanted = true;
                start_afters(watch);
        } else if (!watch->why) {
                /* What was let go is not begun again. */
                bs_watch_start(watch, item, item->kind == BS_WATCH_BEFORE ? "before" : "session");
        }
}

static void obey(struct bs_watch *watch, const struct bs_watch_message *message)
{
        struct bs_watch_item *item = &watch->items[message->item];

        if (message->word == BS_WATCH_ARM) {
                item->armed = true;
                /* Too late to be let go with the others: it is as soon as it is begun. */
                item->pending = watch->why != NULL;
                if (!watch->began_ms)
                        watch->began_ms = bs_watch_now_ms();
        } else if (message->word == BS_WATCH_DISARM) {
                item->armed = item->pending = false;
        } else if (message->word == BS_WATCH_START) {
                start(watch, message->item);
        } else if (message->word == BS_WATCH_DISMISS) {
                watch->dismissed = true;
        } else if (message->word == BS_WATCH_KILL) {
                end_command(item, bs_watch_now_ms());
        } else if (message->word == BS_WATCH_ASK) {
                bs_watch_reap(watch);
                bs_watch_send(watch, BS_WATCH_ASK, message->item, 0);
        }
}

static void listen_to_controller(struct bs_watch *watch)
{
        struct bs_watch_message message;
        ssize_t got = recv(watch->control, &message, sizeof(message), MSG_DONTWAIT);

        if (got < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (got <= 0) {
                /* Nothing is begun any more, so what is let go now stays so. */
                watch->alone = true;
                if (anything_in_force(watch))
                        let_all_go(watch, "the controller is gone");
                return;
        }
        if (got == sizeof(message) && message.item < watch->count)
                obey(watch, &message);
}

static int wait_for_news(struct bs_watch *watch, uint64_t now, uint64_t next)
{
        struct pollfd polled[] = {
                {.fd = watch->alone ? -1 : watch->control, .events = POLLIN},
                {.fd = watch->signals, .events = POLLIN},
        };
        struct signalfd_siginfo info;
        int timeout = !next ? -1 : next <= now ? 0 : next - now > 60000 ? 60000 : (int)(next - now);

        if (poll(polled, 2, timeout) < 0)
                return errno == EINTR ? 0 : -errno;
        if (polled[1].revents) {
                while (read(watch->signals, &info, sizeof(info)) == sizeof(info))
                        ;
                bs_watch_reap(watch);
        }
        if (polled[0].revents)
                listen_to_controller(watch);
        return 0;
}

/* Return the earlier of two times, of which 0 is never. */
static uint64_t earlier(uint64_t a, uint64_t b)
{
        return !a || (b && b < a) ? b : a;
}

int bs_watch_run(struct bs_watch *watch)
{
        for (;;) {
                uint64_t now = bs_watch_now_ms(), end = watch->began_ms + watch->limit_ms, next;
                int r;

                if (watch->began_ms && !watch->why && anything_in_force(watch)) {
                        if (now >= end)
                                let_all_go(watch, "the time was up");
                } else {
                        end = 0;
                }
                start_afters(watch);
                next = earlier(press(watch, now), earlier(try_again(watch, now), watch->why ? 0 : end));
                if (!anything_runs(watch) && watch->why && !watch->reported) {
                        watch->reported = true;
                        syslog(LOG_ERR, "%s: applications and filesystems were let go after %d ms",
                               watch->why, watch->took_ms);
                }
                if (!anything_runs(watch) && watch->alone) {
                        if (watch->why || !watch->dismissed)
                                bs_watch_record(watch);
                        return 0;
                }
                r = wait_for_news(watch, now, next);
                if (r < 0) {
                        let_all_go(watch, "the watchdog failed");
                        return r;
                }
        }
}
