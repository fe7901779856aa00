/* SPDX-License-Identifier: Apache-2.0 */
#include "account.h"

#include <errno.h>
#include <linux/capability.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Where there are two, the first of them takes 16 bits. */
#ifdef SYS_setresuid32
enum { SET_USERS = SYS_setresuid32 };
#else
enum { SET_USERS = SYS_setresuid };
#endif

int bs_act_as(uid_t uid)
{
        struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
        struct __user_cap_data_struct capabilities[_LINUX_CAPABILITY_U32S_3];

        if (syscall(SYS_capget, &header, capabilities) < 0 ||
            syscall(SET_USERS, (uid_t)-1, uid, (uid_t)-1) < 0)
                return -errno;
        /* The kernel takes them away from who is not root any more (capabilities(7)), but leaves the right to
         * take them again. */
        return syscall(SYS_capset, &header, capabilities) < 0 ? -errno : 0;
}
