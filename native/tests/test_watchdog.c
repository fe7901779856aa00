/* SPDX-License-Identifier: Apache-2.0 */
/* The watchdog in a child of the test: what it is told, what it does, and when; with sanitizers. */
#include "check.h"
#include "watchdog.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static struct bs_watch watch;

static int parse(int count, const char *const words[])
{
        static char copies[64][64];
        char *argv[64];

        CHECK(count <= 64);
        for (int i = 0; i < count; i++) {
                snprintf(copies[i], sizeof(copies[i]), "%s", words[i]);
                argv[i] = copies[i];
        }
        return bs_watch_parse(count, argv, &watch);
}

#define PARSE(...)                                                                                           \
        parse((int)(sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)), (const char *[]){__VA_ARGS__})

static void test_arguments(void)
{
        CHECK_EQUAL(PARSE("3", "-1", "1000"), 0);
        CHECK_EQUAL(watch.count, 0);
        CHECK_EQUAL(PARSE("3", "4", "1000", "thaw", "5", "write", "6", "0", "before", "7", "2", "/bin/a", ";",
                          ";", "after", "9000", "7", "1", "/bin/b", ";", "session", "8", "9", "10", "11", "1",
                          "/bin/c", ";", "hangup", "12"),
                    0);
        CHECK_EQUAL(watch.count, 6);
        CHECK_EQUAL(watch.limit_ms, 1000);
        CHECK_EQUAL(watch.items[0].kind, BS_WATCH_THAW);
        CHECK_EQUAL(watch.items[1].fd, 6);
        CHECK(strcmp(watch.items[1].text, "0") == 0);
        /* A word may look like the separator. */
        CHECK(strcmp(watch.items[2].argv[1], ";") == 0);
        CHECK(watch.items[2].argv[2] == NULL);
        CHECK_EQUAL(watch.items[2].limit_ms, 0);
        CHECK_EQUAL(watch.items[3].limit_ms, 9000);
        CHECK_EQUAL(watch.items[3].output, 7);
        CHECK_EQUAL(watch.items[4].tell, 10);
        CHECK_EQUAL(watch.items[4].output, 11);
        CHECK_EQUAL(watch.items[5].kind, BS_WATCH_HANGUP);
        CHECK_EQUAL(watch.items[5].fd, 12);
}

static void test_arguments_that_make_no_sense(void)
{
        CHECK_EQUAL(PARSE("3"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-2", "1"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "0"), -EINVAL);
        CHECK_EQUAL(PARSE("x", "-1", "1"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "99999999999"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "thaw"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "thaw", "-1"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "melt", "1"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "write", "1"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "hangup"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "before", "1", "0", ";"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "before", "1", "1", "/bin/a"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "before", "1", "9", "/bin/a", ";"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "after", "0", "1", "1", "relative", ";"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "after", "-1", "1", "1", "/bin/a", ";"), -EINVAL);
        CHECK_EQUAL(PARSE("3", "-1", "1", "session", "1", "2", "3", "4"), -EINVAL);
}

static void test_as_many_items_as_there_is_room_for(void)
{
        static char words[3 + 2 * (BS_WATCH_ITEMS + 1)][8];
        static char *argv[3 + 2 * (BS_WATCH_ITEMS + 1)];
        int count = 0;

        for (int i = 0; i < 3; i++)
                snprintf(words[count++], 8, "%d", 3);
        for (int i = 0; i <= BS_WATCH_ITEMS; i++) {
                snprintf(words[count++], 8, "thaw");
                snprintf(words[count++], 8, "3");
        }
        for (int i = 0; i < count; i++)
                argv[i] = words[i];
        CHECK_EQUAL(bs_watch_parse(count - 2, argv, &watch), 0);
        CHECK_EQUAL(bs_watch_parse(count, argv, &watch), -E2BIG);
}

struct running {
        int control;
        int file; /* what is written to when all is let go */
        int journal;
        pid_t pid;
};

/* The first item is a command `before` the other if there is a script for it, else a text that is written. */
static struct running start_items(uint64_t limit_ms, uint64_t after_ms, const char *before,
                                  const char *script)
{
        static char shell[] = "/bin/sh", option[] = "-c", copy[256], first[256];
        static char *argv[] = {shell, option, copy, NULL}, *argv_before[] = {shell, option, first, NULL};
        char file[] = "/tmp/blocksnap-test-XXXXXX", journal[] = "/tmp/blocksnap-test-XXXXXX";
        struct running made;
        int pair[2];

        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
        made.control = pair[0];
        made.file = mkstemp(file);
        made.journal = mkstemp(journal);
        CHECK(made.file >= 0 && made.journal >= 0);
        unlink(file);
        unlink(journal);
        made.pid = fork();
        if (made.pid == 0) {
                close(pair[0]);
                memset(&watch, 0, sizeof(watch));
                snprintf(copy, sizeof(copy), "%s", script);
                watch.control = pair[1];
                watch.journal = made.journal;
                watch.limit_ms = limit_ms;
                watch.count = 2;
                watch.items[0] = (struct bs_watch_item){.kind = BS_WATCH_WRITE,
                                                        .fd = made.file,
                                                        .text = "go",
                                                        .answer = -1,
                                                        .tell = -1,
                                                        .output = -1};
                if (before) {
                        snprintf(first, sizeof(first), "%s", before);
                        watch.items[0].kind = BS_WATCH_BEFORE;
                        watch.items[0].argv = argv_before;
                        watch.items[0].fd = -1;
                        watch.items[0].output = made.file;
                }
                watch.items[1] = (struct bs_watch_item){.kind = BS_WATCH_AFTER,
                                                        .argv = argv,
                                                        .limit_ms = after_ms,
                                                        .fd = -1,
                                                        .answer = -1,
                                                        .tell = -1,
                                                        .output = made.file};
                if (bs_watch_prepare(&watch) < 0)
                        _exit(99);
                _exit(bs_watch_run(&watch) < 0);
        }
        close(pair[1]);
        return made;
}

static struct running start_with(uint64_t limit_ms, uint64_t after_ms, const char *script)
{
        return start_items(limit_ms, after_ms, NULL, script);
}

static struct running start(uint64_t limit_ms, const char *script)
{
        return start_with(limit_ms, 0, script);
}

static struct running start_pair(const char *before, const char *after)
{
        return start_items(60000, 0, before, after);
}

static void say(const struct running *running, uint32_t word, uint32_t item)
{
        struct bs_watch_message message = {.word = word, .item = item};

        CHECK_EQUAL(send(running->control, &message, sizeof(message), MSG_NOSIGNAL),
                    (ssize_t)sizeof(message));
}

static int32_t hear(const struct running *running, uint32_t word)
{
        struct bs_watch_message message;

        do {
                CHECK_EQUAL(recv(running->control, &message, sizeof(message), 0), (ssize_t)sizeof(message));
        } while (message.word != word);
        return message.value;
}

/* End it, and return what was written. */
static const char *finish(struct running *running, const char **journal)
{
        static char text[64], lines[512];
        int status;

        if (running->control >= 0)
                close(running->control);
        CHECK_EQUAL(waitpid(running->pid, &status, 0), running->pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        memset(text, 0, sizeof(text));
        memset(lines, 0, sizeof(lines));
        CHECK(pread(running->file, text, sizeof(text) - 1, 0) >= 0);
        CHECK(pread(running->journal, lines, sizeof(lines) - 1, 0) >= 0);
        close(running->file);
        close(running->journal);
        if (journal)
                *journal = lines;
        return text;
}

static void test_nothing_is_done_when_nothing_is_in_force(void)
{
        struct running running = start(60000, "exit 0");
        const char *journal;

        say(&running, BS_WATCH_ARM, 0);
        say(&running, BS_WATCH_DISARM, 0);
        say(&running, BS_WATCH_DISMISS, 0);
        CHECK(strcmp(finish(&running, &journal), "") == 0);
        CHECK(strcmp(journal, "") == 0);
}

static void test_a_controller_that_goes_lets_everything_go(void)
{
        struct running running = start(60000, "printf after");
        const char *journal;

        say(&running, BS_WATCH_ARM, 0);
        say(&running, BS_WATCH_ARM, 1);
        /* `after` shares the offset of the file; the text is written at its beginning first. */
        CHECK(strcmp(finish(&running, &journal), "after") == 0);
        CHECK(strstr(journal, "the controller is gone") != NULL);
        CHECK(strstr(journal, "\"failed\": 0") != NULL);
}

static void test_who_asks_has_been_told_of_what_has_ended(void)
{
        struct running running = start(60000, "exit 7");
        struct bs_watch_message message = {0};
        bool told = false;

        say(&running, BS_WATCH_START, 1);
        for (int i = 0; i < 1000 && !told; i++) {
                say(&running, BS_WATCH_ASK, 1);
                do {
                        CHECK_EQUAL(recv(running.control, &message, sizeof(message), 0),
                                    (ssize_t)sizeof(message));
                        told = told || (message.word == BS_WATCH_ENDED && message.value == 7);
                } while (message.word != BS_WATCH_ASK);
                usleep(10000);
        }
        CHECK(told);
        CHECK(strcmp(finish(&running, NULL), "") == 0);
}

static void test_a_deadline_that_passes_lets_everything_go(void)
{
        struct running running = start(50, "printf after");
        const char *journal;

        say(&running, BS_WATCH_ARM, 0);
        CHECK(hear(&running, BS_WATCH_EXPIRED) >= 50);
        CHECK(strcmp(finish(&running, &journal), "go") == 0);
        CHECK(strstr(journal, "the time was up") != NULL);
}

static void expect_go(const struct running *running)
{
        char text[3] = {0};

        for (int i = 0; i < 1000 && strcmp(text, "go") != 0; i++) {
                usleep(10000);
                CHECK(pread(running->file, text, 2, 0) == 2);
        }
        CHECK(strcmp(text, "go") == 0);
}

static void test_what_is_begun_when_the_time_was_up_is_let_go_too(void)
{
        struct running running = start(50, "exit 0");

        /* It says that it goes, so nothing was begun when all is let go. */
        CHECK_EQUAL(pwrite(running.file, "go", 2, 0), 2);
        say(&running, BS_WATCH_ARM, 0);
        hear(&running, BS_WATCH_EXPIRED);
        usleep(100000);
        CHECK_EQUAL(pwrite(running.file, "no", 2, 0), 2);
        expect_go(&running);
        /* Once it was let go, it is not ours any more. */
        usleep(100000);
        CHECK_EQUAL(pwrite(running.file, "no", 2, 0), 2);
        usleep(100000);
        CHECK(strcmp(finish(&running, NULL), "go") == 0);
}

static void test_what_is_armed_when_the_time_was_up_is_let_go_too(void)
{
        struct running running = start_with(50, 60000, "exit 0");

        CHECK_EQUAL(pwrite(running.file, "go", 2, 0), 2);
        say(&running, BS_WATCH_ARM, 1);
        hear(&running, BS_WATCH_EXPIRED);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), 0);
        say(&running, BS_WATCH_ARM, 0);
        usleep(100000);
        CHECK_EQUAL(pwrite(running.file, "no", 2, 0), 2);
        expect_go(&running);
        CHECK(strcmp(finish(&running, NULL), "go") == 0);
}

static void test_after_is_run_once_by_whoever_asks(void)
{
        struct running running = start_with(200, 60000, "printf x >&2; exit 7");

        say(&running, BS_WATCH_ARM, 1);
        say(&running, BS_WATCH_START, 1);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), 7);
        say(&running, BS_WATCH_START, 1);
        /* Still in force when the time is up: it is not started again. */
        hear(&running, BS_WATCH_EXPIRED);
        CHECK(strcmp(finish(&running, NULL), "x") == 0);
}

static void test_after_has_the_time_of_the_standstill_or_its_own(void)
{
        struct running running = start(50, "sleep 20; printf after");
        const char *journal;

        say(&running, BS_WATCH_ARM, 1);
        CHECK(strcmp(finish(&running, &journal), "") == 0);
        CHECK(strstr(journal, "\"failed\": 0") != NULL);

        running = start_with(50, 60000, "sleep 0.3; printf after");
        say(&running, BS_WATCH_ARM, 1);
        CHECK(strcmp(finish(&running, &journal), "after") == 0);
        CHECK(strstr(journal, "\"failed\": 0") != NULL);

        running = start_with(60000, 50, "sleep 20");
        say(&running, BS_WATCH_ARM, 1);
        CHECK(strcmp(finish(&running, &journal), "") == 0);
        CHECK(strstr(journal, "\"failed\": 1") != NULL);
}

/* Whoever is interrupted asks for `after` while `before` works; what that would still do, nothing undoes. */
static void test_after_is_not_run_beside_its_before(void)
{
        struct running running = start_pair("sleep 0.3; printf locked", "printf after");

        say(&running, BS_WATCH_ARM, 1);
        say(&running, BS_WATCH_START, 0);
        say(&running, BS_WATCH_START, 1);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), -SIGTERM);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), 0);
        usleep(400000);
        CHECK(strcmp(finish(&running, NULL), "after") == 0);

        running = start_pair("trap '' TERM; printf 1; while :; do sleep 0.1; done", "printf after");
        say(&running, BS_WATCH_ARM, 1);
        say(&running, BS_WATCH_START, 0);
        while (lseek(running.file, 0, SEEK_END) == 0)
                usleep(1000);
        say(&running, BS_WATCH_START, 1);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), -SIGKILL);
        CHECK_EQUAL(hear(&running, BS_WATCH_ENDED), 0);
        CHECK(strcmp(finish(&running, NULL), "1after") == 0);
}

static void test_what_cannot_be_understood_is_passed_over(void)
{
        struct running running = start(60000, "exit 0");
        char junk[100] = {0};

        say(&running, BS_WATCH_ARM, 2);
        say(&running, BS_WATCH_START, UINT32_MAX);
        say(&running, 99, 0);
        say(&running, BS_WATCH_START, 0);
        CHECK_EQUAL(send(running.control, junk, 3, 0), 3);
        CHECK_EQUAL(send(running.control, junk, sizeof(junk), 0), (ssize_t)sizeof(junk));
        CHECK(strcmp(finish(&running, NULL), "") == 0);
}

int main(void)
{
        test_arguments();
        test_arguments_that_make_no_sense();
        test_as_many_items_as_there_is_room_for();
        test_nothing_is_done_when_nothing_is_in_force();
        test_a_controller_that_goes_lets_everything_go();
        test_who_asks_has_been_told_of_what_has_ended();
        test_a_deadline_that_passes_lets_everything_go();
        test_what_is_begun_when_the_time_was_up_is_let_go_too();
        test_what_is_armed_when_the_time_was_up_is_let_go_too();
        test_after_is_run_once_by_whoever_asks();
        test_after_has_the_time_of_the_standstill_or_its_own();
        test_after_is_not_run_beside_its_before();
        test_what_cannot_be_understood_is_passed_over();
        return 0;
}
