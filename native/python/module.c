/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blocksnap._native: the core for Python. The contract, with the documentation of every function, is
 * blocksnap/_native.pyi. Nothing here keeps state, so any number of interpreters may load it.
 */
#include "account.h"
#include "binding.h"

#include <errno.h>
#include <malloc.h>

static PyObject *retain_memory(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        uint64_t limit;

        if (!PyArg_ParseTuple(arguments, "O&:retain_memory", bs_to_u64, &limit))
                return NULL;
#ifdef __GLIBC__
        /* glibc takes no more; the headers of a block and of the object in it come on top of the limit. */
        enum { THRESHOLD_MAX = 32 << 20, HEADERS = 4096, TRIM_THRESHOLD = 256 << 20 };
        int threshold = limit < THRESHOLD_MAX - HEADERS ? (int)limit + HEADERS : THRESHOLD_MAX;

        /*
         * Blocks up to the threshold come from the heap instead of a mapping of their own, and the heap gives
         * its end back only when this much of it is free. M_TOP_PAD is what a heap keeps when all in it is
         * freed; without it a thread's heap shrinks and grows with every buffer. The number of arenas stays
         * as it is: a buffer goes back to the arena it came from, so each thread finds its own again. All of
         * this is a wish; another allocator in place of glibc's (a sanitizer's) may refuse it.
         */
        mallopt(M_MMAP_THRESHOLD, threshold);
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD);
        mallopt(M_TOP_PAD, threshold);
#endif
        Py_RETURN_NONE;
}

static PyObject *act_as(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        uint64_t uid;
        int r;

        if (!PyArg_ParseTuple(arguments, "O&:act_as", bs_to_u64, &uid))
                return NULL;
        /* The last one means "as it is" to the kernel. */
        r = uid < UINT32_MAX ? bs_act_as((uid_t)uid) : -EINVAL;
        if (r < 0) {
                errno = -r;
                return PyErr_SetFromErrno(PyExc_OSError);
        }
        Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
        {"act_as", act_as, METH_VARARGS, NULL},
        {"retain_memory", retain_memory, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
        int (*const parts[])(PyObject *) = {
                bs_add_bitmap_functions, bs_add_btrfs_functions, bs_add_btrfs_send_functions,
                bs_add_cow_functions,    bs_add_file_functions,  bs_add_thin_functions,
        };

        for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
                if (parts[i](module) < 0)
                        return -1;
        }
        return 0;
}

/* Casting a function to void * is what slots are; POSIX allows it, ISO C knows no way to say so. */
static PyModuleDef_Slot slots[] = {
        {Py_mod_exec, (void *)module_exec},
#ifdef Py_mod_multiple_interpreters
        {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
        {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
        {0, NULL},
};

static struct PyModuleDef definition = {
        PyModuleDef_HEAD_INIT,
        .m_name = "blocksnap._native",
        .m_doc = "The C core of blocksnap; blocksnap/_native.pyi documents it.",
        .m_size = 0,
        .m_methods = methods,
        .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
        return PyModuleDef_Init(&definition);
}
