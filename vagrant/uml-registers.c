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

/*
 * Make a buffer of the host's size of one that may be shorter; NULL when that is not needed. errno says
 * nothing here: User Mode Linux handles signals in this thread, and they may change it at any moment.
 */
static const struct iovec *widen(ptrace_fn next, pid_t pid, void *kind, const struct iovec *given)
{
        static _Thread_local uint8_t state[STATE_SIZE] __attribute__((aligned(64)));
        static _Thread_local struct iovec whole;
        uint64_t components;

        if (whole.iov_len == 0) {
                struct iovec asked = {.iov_base = state, .iov_len = sizeof(state)};

                if (next(PTRACE_GETREGSET, pid, kind, &asked) < 0)
                        return NULL;
                whole = asked;
        }
        if (given->iov_len >= whole.iov_len || given->iov_len < COMPONENTS_OFFSET + sizeof(components))
                return NULL;
        memset(state, 0, whole.iov_len);
        memcpy(state, given->iov_base, given->iov_len);
        memcpy(&components, state + COMPONENTS_OFFSET, sizeof(components));
        components &= ~(uint64_t)AMX_COMPONENTS;
        memcpy(state + COMPONENTS_OFFSET, &components, sizeof(components));
        return &whole;
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
        if (request == PTRACE_SETREGSET && address == (void *)(uintptr_t)NT_X86_XSTATE) {
                const struct iovec *whole = widen(next, pid, address, data);

                if (whole)
                        return next(request, pid, address, whole);
        }
        return next(request, pid, address, data);
}
