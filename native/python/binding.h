/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the binding share. Only this folder includes Python.h; a file here takes arguments, lets
 * go of the GIL, calls one function of the core, and turns what comes back into objects or exceptions.
 */
#ifndef BLOCKSNAP_PYTHON_BINDING_H
#define BLOCKSNAP_PYTHON_BINDING_H

#include <Python.h>

#include "cleanup.h"
#include "error.h"
#include "extent.h"
#include "interrupt.h"

#include <stdint.h>
#include <time.h>

static inline void bs_release_object(PyObject **object)
{
        Py_XDECREF(*object);
}

static inline void bs_release_buffer(Py_buffer *view)
{
        /* Does nothing for a view that was never filled. */
        PyBuffer_Release(view);
}

#define _cleanup_object_ _cleanup_(bs_release_object)
#define _cleanup_buffer_ _cleanup_(bs_release_buffer)

/* A scan that runs without the GIL; `interrupt` lets signals through, `error` is for the core to fill. */
struct bs_python_scan {
        PyThreadState *state;
        struct timespec checked;
        struct bs_interrupt interrupt;
        struct bs_error error;
};

/* Let go of the GIL, and take it again. Between the two nothing of Python may be touched. */
void bs_scan_begin(struct bs_python_scan *scan);
void bs_scan_end(struct bs_python_scan *scan);

/*
 * Turn what a core function returned into an exception, and return NULL; error.h says what is set when.
 * `metadata` is what was read, and `key` what was looked up in it.
 */
PyObject *bs_raise(int result, const struct bs_error *error, const char *metadata, uint64_t key);

/* For O& of PyArg_ParseTuple, whose own K does not notice overflow; `out` is a uint64_t. */
int bs_to_u64(PyObject *object, void *out);

/* A new bytes object of `size` bytes with undefined content; `*out` points to it. */
PyObject *bs_new_bytes(uint64_t size, uint8_t **out);

/* The set bits of a bitmap, or the extents of a list, packed. */
PyObject *bs_bytes_from_bitmap(const uint8_t *bitmap, uint64_t bytes, uint64_t first, uint64_t unit);
PyObject *bs_bytes_from_extents(const struct bs_extents *extents);

/* Add the functions, and the constants, of one part of the core; 0, or -1 with an exception. */
int bs_add_bitmap_functions(PyObject *module);
int bs_add_btrfs_functions(PyObject *module);
int bs_add_btrfs_send_functions(PyObject *module);
int bs_add_cow_functions(PyObject *module);
int bs_add_file_functions(PyObject *module);
int bs_add_thin_functions(PyObject *module);

#endif
