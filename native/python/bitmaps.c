/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps as byte strings. */
#include "binding.h"

#include "bitmap.h"

static PyObject *bitmap_extents(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer bitmap = {.buf = NULL};
        uint64_t unit;
        uint64_t first = 0;

        if (!PyArg_ParseTuple(arguments, "y*O&|O&:bitmap_extents", &bitmap, bs_to_u64, &unit, bs_to_u64,
                              &first))
                return NULL;
        if (unit == 0) {
                PyErr_SetString(PyExc_ValueError, "unit has to be positive");
                return NULL;
        }
        return bs_bytes_from_bitmap(bitmap.buf, (uint64_t)bitmap.len, first, unit);
}

static PyObject *bitmap_subtract(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer a = {.buf = NULL};
        _cleanup_buffer_ Py_buffer b = {.buf = NULL};
        uint8_t *out;

        if (!PyArg_ParseTuple(arguments, "y*y*:bitmap_subtract", &a, &b))
                return NULL;

        PyObject *difference = bs_new_bytes((uint64_t)a.len, &out);

        if (!difference)
                return NULL;
        Py_BEGIN_ALLOW_THREADS
                bs_bitmap_subtract(a.buf, (size_t)a.len, b.buf, (size_t)b.len, out);
        Py_END_ALLOW_THREADS
        return difference;
}

static PyObject *bitmap_update(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer old = {.buf = NULL};
        _cleanup_buffer_ Py_buffer set = {.buf = NULL};
        _cleanup_buffer_ Py_buffer clear = {.buf = NULL};
        uint64_t bits;
        uint64_t unit;
        uint8_t *out;

        if (!PyArg_ParseTuple(arguments, "y*O&O&y*y*:bitmap_update", &old, bs_to_u64, &bits, bs_to_u64, &unit,
                              &set, &clear))
                return NULL;
        if (unit == 0 || set.len % BS_PACKED_EXTENT_SIZE || clear.len % BS_PACKED_EXTENT_SIZE) {
                PyErr_SetString(PyExc_ValueError,
                                "unit has to be positive, and packed extents 16 bytes each");
                return NULL;
        }

        uint64_t bytes = bs_bitmap_bytes(bits);
        size_t kept = (uint64_t)old.len < bytes ? (size_t)old.len : (size_t)bytes;
        _cleanup_object_ PyObject *bitmap = bs_new_bytes(bytes, &out);
        int result;

        if (!bitmap)
                return NULL;
        Py_BEGIN_ALLOW_THREADS
                memset(out + kept, 0, (size_t)bytes - kept);
                memcpy(out, old.buf, kept);
                bs_bitmap_fill(out, bits, bytes * 8 - bits, false);
                result = bs_bitmap_apply(out, bits, unit, clear.buf,
                                         (size_t)clear.len / BS_PACKED_EXTENT_SIZE, false);
                if (result == 0)
                        result = bs_bitmap_apply(out, bits, unit, set.buf,
                                                 (size_t)set.len / BS_PACKED_EXTENT_SIZE, true);
        Py_END_ALLOW_THREADS
        if (result < 0) {
                PyErr_SetString(PyExc_OverflowError, "an extent ends beyond 2^64 bytes");
                return NULL;
        }
        return Py_NewRef(bitmap);
}

static PyMethodDef methods[] = {
        {"bitmap_extents", bitmap_extents, METH_VARARGS, NULL},
        {"bitmap_subtract", bitmap_subtract, METH_VARARGS, NULL},
        {"bitmap_update", bitmap_update, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_bitmap_functions(PyObject *module)
{
        return PyModule_AddFunctions(module, methods);
}
