/* SPDX-License-Identifier: Apache-2.0 */
#include "watchdog.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* The arguments that are still to be read. */
struct words {
        char **at;
        int left;
};

static int take(struct words *words, char **out)
{
        if (words->left < 1)
                return -EINVAL;
        *out = *words->at++;
        words->left--;
        return 0;
}

static int take_number(struct words *words, int least, int *out)
{
        char *text, *end;
        long value;
        int r = take(words, &text);

        if (r < 0)
                return r;
        errno = 0;
        value = strtol(text, &end, 10);
        if (errno || end == text || *end || value < least || value > INT_MAX)
                return -EINVAL;
        *out = (int)value;
        return 0;
}

static int take_command(struct words *words, struct bs_watch_item *item)
{
        int count, r;

        if ((r = take_number(words, 0, &item->output)) < 0 || (r = take_number(words, 1, &count)) < 0)
                return r;
        if (count >= words->left || strcmp(words->at[count], ";") != 0 || words->at[0][0] != '/')
                return -EINVAL;
        item->argv = words->at;
        /* exec wants the words to end with NULL, and here is room for it. */
        words->at[count] = NULL;
        words->at += count + 1;
        words->left -= count + 1;
        return 0;
}

static int take_item(struct words *words, struct bs_watch_item *item)
{
        char *kind, *text;
        int r = take(words, &kind), limit;

        if (r < 0)
                return r;
        if (strcmp(kind, "thaw") == 0) {
                item->kind = BS_WATCH_THAW;
                return take_number(words, 0, &item->fd);
        }
        if (strcmp(kind, "hangup") == 0) {
                item->kind = BS_WATCH_HANGUP;
                return take_number(words, 0, &item->fd);
        }
        if (strcmp(kind, "write") == 0) {
                item->kind = BS_WATCH_WRITE;
                if ((r = take_number(words, 0, &item->fd)) < 0 || (r = take(words, &text)) < 0)
                        return r;
                item->text = text;
                return strlen(text) < BS_WATCH_TEXT ? 0 : -EINVAL;
        }
        if (strcmp(kind, "before") == 0) {
                item->kind = BS_WATCH_BEFORE;
                return take_command(words, item);
        }
        if (strcmp(kind, "after") == 0) {
                item->kind = BS_WATCH_AFTER;
                if ((r = take_number(words, 0, &limit)) < 0)
                        return r;
                item->limit_ms = (uint64_t)limit;
                return take_command(words, item);
        }
        if (strcmp(kind, "session") != 0)
                return -EINVAL;
        item->kind = BS_WATCH_SESSION;
        if ((r = take_number(words, 0, &item->fd)) < 0 || (r = take_number(words, 0, &item->answer)) < 0 ||
            (r = take_number(words, 0, &item->tell)) < 0)
                return r;
        return take_command(words, item);
}

int bs_watch_parse(int argc, char **argv, struct bs_watch *out)
{
        struct words words = {argv, argc};
        int limit, r;

        memset(out, 0, sizeof(*out));
        out->signals = -1;
        if ((r = take_number(&words, 0, &out->control)) < 0 ||
            (r = take_number(&words, -1, &out->journal)) < 0 || (r = take_number(&words, 1, &limit)) < 0)
                return r;
        out->limit_ms = (uint64_t)limit;
        while (words.left > 0) {
                struct bs_watch_item *item;

                if (out->count == BS_WATCH_ITEMS)
                        return -E2BIG;
                item = &out->items[out->count++];
                item->fd = item->answer = item->tell = item->output = -1;
                if ((r = take_item(&words, item)) < 0)
                        return r;
        }
        return 0;
}
