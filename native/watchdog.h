/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The process that ends a standstill when the controller cannot: it is stopped, dead, or slow.
 *
 * It is told at its start, in its arguments, all that may ever have to be let go, with every descriptor
 * open; it locks its memory, so that a frozen filesystem or a suspended device cannot stop it; and it
 * allocates nothing afterwards. The controller says through a socket what is in force at the moment. When
 * the time is up, or that socket closes while anything is in force, all of it is let go.
 *
 * It is also the parent of the administrator's commands. So they are started without the controller's
 * having to fork, and each `after` is run exactly once, whoever asks for it.
 *
 * docs/design.md, section 5.2, has the whole of it.
 */
#ifndef BLOCKSNAP_WATCHDOG_H
#define BLOCKSNAP_WATCHDOG_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum {
        BS_WATCH_ITEMS = 128,
        BS_WATCH_TEXT = 4096,
        /* How long a command has to end after it was asked to, in milliseconds, and again after SIGTERM. */
        BS_WATCH_GRACE_MS = 300,
        /* How often what may be about to be begun, though the time was up, is let go, in milliseconds. */
        BS_WATCH_RETRY_MS = 20,
};

enum bs_watch_kind {
        BS_WATCH_THAW = 1, /* FITHAW */
        BS_WATCH_WRITE,    /* write a text to a file */
        BS_WATCH_BEFORE,   /* a command that has to end by itself, and is killed otherwise */
        BS_WATCH_AFTER,    /* a command that is run in any case once it is in force */
        BS_WATCH_SESSION,  /* a command that stands still until it is told to end */
        BS_WATCH_HANGUP,   /* shut a connection down: its server lets go of what the session held */
};

/* What the controller says, and what it is told. */
enum bs_watch_word {
        BS_WATCH_ARM = 1, /* the item is in force; the first one starts the clock */
        BS_WATCH_START,   /* start the command; an `after` ends the `before` in front of it first */
        BS_WATCH_DISARM,  /* the item is not in force any more */
        BS_WATCH_KILL,    /* end the command, with all processes of its session */
        BS_WATCH_DISMISS, /* the controller needs no watchdog any more */
        BS_WATCH_ENDED,   /* the command ended: value is its exit code, or -N for signal N */
        BS_WATCH_EXPIRED, /* everything is being let go, the time was up: value is milliseconds */
        BS_WATCH_ASK,     /* answered alike, when of all commands that have ended by now that was told */
};

struct bs_watch_message {
        uint32_t word;
        uint32_t item;
        int32_t value;
};

struct bs_watch_item {
        enum bs_watch_kind kind;
        const char *text;  /* WRITE: what to write */
        char **argv;       /* of a command; argv[0] is its path */
        int fd;            /* THAW, WRITE, HANGUP: what to act on; SESSION: the command's standard input */
        int answer;        /* SESSION: its standard output */
        int tell;          /* SESSION: the other end of its standard input */
        int output;        /* of a command: standard error, and output where there is no answer */
        uint64_t limit_ms; /* AFTER: how long it may take, 0 for as long as all of the standstill */
        bool armed;
        bool started;
        bool wanted;                     /* AFTER: it was asked for, and is started when `before` has ended */
        bool pending;                    /* it was not begun yet when it was to be let go */
        pid_t pid;                       /* 0 unless it runs */
        uint64_t term_at_ms, kill_at_ms; /* when to end it, 0 for never */
        int failure;                     /* errno of letting it go */
};

struct bs_watch {
        int control;
        int journal; /* -1 for none */
        int signals;
        uint64_t limit_ms;
        uint64_t began_ms; /* when the first item came in force; 0 before */
        const char *why;   /* why everything was let go; NULL before */
        int took_ms;
        bool alone; /* the controller is gone */
        bool dismissed;
        bool reported; /* to the system's log */
        uint32_t count;
        struct bs_watch_item items[BS_WATCH_ITEMS];
};

/*
 * Read the arguments: CONTROL JOURNAL MILLISECONDS, then items, each of which is one of
 *
 *     thaw FD
 *     write FD TEXT          FD can be read too: what reads as TEXT was not begun
 *     hangup FD
 *     before OUTPUT COUNT WORD... ;
 *     after MILLISECONDS OUTPUT COUNT WORD... ;
 *     session INPUT ANSWER TELL OUTPUT COUNT WORD... ;
 *
 * The separator behind the words is overwritten. An `after` right behind a `before` is started when that has
 * ended, and whoever asks for it has that killed. With 0 milliseconds it may take as long as all of the
 * standstill, and is done with however it ends; one with a time of its own that fails was not let go, and is
 * up to the next run. Returns -EINVAL for anything else, -E2BIG for too many.
 */
int bs_watch_parse(int argc, char **argv, struct bs_watch *out);

/* Lock the memory, give the descriptors to no command, take the signals. Without the privilege to, it stays
 * unlocked. */
int bs_watch_prepare(struct bs_watch *watch);

/* Keep watch until there is nothing left to do. Returns 0, or -errno when it could not go on. */
int bs_watch_run(struct bs_watch *watch);

/* The parts of it that act; watchdog_actions.c. */
uint64_t bs_watch_now_ms(void);
int bs_watch_start(struct bs_watch *watch, struct bs_watch_item *item, const char *phase);
void bs_watch_let_go(struct bs_watch_item *item);
void bs_watch_tell_end(struct bs_watch_item *item);
void bs_watch_reap(struct bs_watch *watch);
void bs_watch_send(struct bs_watch *watch, enum bs_watch_word word, uint32_t item, int32_t value);
void bs_watch_record(struct bs_watch *watch);

#endif
