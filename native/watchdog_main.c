/* SPDX-License-Identifier: Apache-2.0 */
#include "watchdog.h"

#include <stdio.h>
#include <string.h>
#include <syslog.h>

static struct bs_watch watch;

int main(int argc, char **argv)
{
        int r = bs_watch_parse(argc - 1, argv + 1, &watch);

        if (r < 0) {
                fprintf(stderr, "blocksnap-watchdog is started by blocksnap, never by hand: %s\n",
                        strerror(-r));
                return 2;
        }
        openlog("blocksnap-watchdog", LOG_PID | LOG_NDELAY, LOG_DAEMON);
        r = bs_watch_prepare(&watch);
        if (r < 0) {
                fprintf(stderr, "blocksnap-watchdog: %s\n", strerror(-r));
                return 1;
        }
        bs_watch_send(&watch, BS_WATCH_ARM, 0, 0);
        r = bs_watch_run(&watch);
        if (watch.why)
                syslog(LOG_ERR, "%s: applications and filesystems were let go after %d ms", watch.why,
                       watch.took_ms);
        return r < 0;
}
