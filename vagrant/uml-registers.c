/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded into the lab's kernel, so that it runs on processors with AMX.
 *
 * User Mode Linux keeps a process's floating-point registers in a buffer of a fixed size, sufficient for
 * AVX-512. It sets them with ptrace(PTRACE_SETREGSET, NT_X86_XSTATE), and a host whose processor has more
 * state than that refuses a shorter buffer with EFAULT (arch/x86/kernel/fpu/regset.c, xstateregs_set). Here
 * what is missing is filled up with zeros: the initial state of registers that nothing in the lab can use,
 * since AMX has to be asked for with arch_prctl, which User Mode Linux does not pass on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

enum {
        STATE_SIZE = 1 << 16,
        /* The header of an XSAVE area: which of its components are not in their initial state. */
        COMPONENTS_OFFSET = 512,
        /* Tile configuration and tile data. */
        AMX_COMPONENTS = 3 << 17,
};

typedef long (*ptrace_fn)(enum __ptrace_request request, ...);

/* Set the registers of `pid` from a buffer that is shorter than the host's own. */
static long set_short_state(ptrace_fn next, pid_t pid, void *kind, const struct iovec *given)
{
        static _Thread_local uint8_t state[STATE_SIZE] __attribute__((aligned(64)));
        static _Thread_local size_t whole_size;
        struct iovec whole = {.iov_base = state, .iov_len = sizeof(state)};
        uint64_t components;

        if (whole_size == 0) {
                if (next(PTRACE_GETREGSET, pid, kind, &whole) < 0)
                        return -1;
                whole_size = whole.iov_len;
        }
        whole.iov_len = whole_size;
        if (given->iov_len >= whole.iov_len || given->iov_len < COMPONENTS_OFFSET + sizeof(components)) {
                errno = EFAULT;
                return -1;
        }
        memset(state, 0, whole.iov_len);
        memcpy(state, given->iov_base, given->iov_len);
        memcpy(&components, state + COMPONENTS_OFFSET, sizeof(components));
        components &= ~(uint64_t)AMX_COMPONENTS;
        memcpy(state + COMPONENTS_OFFSET, &components, sizeof(components));
        return next(PTRACE_SETREGSET, pid, kind, &whole);
}

long ptrace(enum __ptrace_request request, ...)
{
        static ptrace_fn next;
        va_list arguments;

        va_start(arguments, request);
        pid_t pid = va_arg(arguments, pid_t);
        void *address = va_arg(arguments, void *);
        void *data = va_arg(arguments, void *);
        va_end(arguments);
        if (!next) {
                void *symbol = dlsym(RTLD_NEXT, "ptrace");

                memcpy(&next, &symbol, sizeof(next));
        }

        long result = next(request, pid, address, data);

        if (result < 0 && errno == EFAULT && request == PTRACE_SETREGSET &&
            address == (void *)(uintptr_t)NT_X86_XSTATE)
                return set_short_state(next, pid, address, data);
        return result;
}
