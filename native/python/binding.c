/* SPDX-License-Identifier: Apache-2.0 */
#include "binding.h"

#include "bitmap.h"

/* How often a scan lets Python look for signals. Taking the GIL can cost 5 ms when others use it. */
enum { SIGNAL_CHECK_NANOSECONDS = 50000000 };

static int check_signals(void *context)
{
        struct bs_python_scan *scan = context;
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((now.tv_sec - scan->checked.tv_sec) * 1000000000LL + now.tv_nsec - scan->checked.tv_nsec <
            SIGNAL_CHECK_NANOSECONDS)
                return 0;
        scan->checked = now;
        PyEval_RestoreThread(scan->state);
        int result = PyErr_CheckSignals();
        scan->state = PyEval_SaveThread();
        return result;
}

void bs_scan_begin(struct bs_python_scan *scan)
{
        *scan = (struct bs_python_scan){.interrupt = {.check = check_signals, .context = scan}};
        clock_gettime(CLOCK_MONOTONIC, &scan->checked);
        scan->state = PyEval_SaveThread();
}

void bs_scan_end(struct bs_python_scan *scan)
{
        PyEval_RestoreThread(scan->state);
}

static PyObject *raise_os_error(int number, const char *call)
{
        _cleanup_object_ PyObject *message = PyUnicode_FromFormat("%s: %s", call, strerror(number));
        _cleanup_object_ PyObject *arguments = message ? Py_BuildValue("(iO)", number, message) : NULL;

        /* Given errno and text, OSError makes itself the right subclass. */
        if (arguments)
                PyErr_SetObject(PyExc_OSError, arguments);
        return NULL;
}

PyObject *bs_raise(int result, const struct bs_error *error, const char *metadata, uint64_t key)
{
        if (PyErr_Occurred())
                return NULL;
        switch (result) {
        case -ENOMEM:
                return PyErr_NoMemory();
        case -EUCLEAN:
                return PyErr_Format(PyExc_ValueError, "%s, block %llu: %s", metadata,
                                    (unsigned long long)error->block, error->reason);
        case -ERANGE:
                PyErr_SetString(PyExc_ValueError, error->reason);
                return NULL;
        case -ENOKEY: {
                _cleanup_object_ PyObject *number = PyLong_FromUnsignedLongLong(key);

                if (number)
                        PyErr_SetObject(PyExc_KeyError, number);
                return NULL;
        }
        default:
                return raise_os_error(-result, error->call ? error->call : "blocksnap");
        }
}

int bs_to_u64(PyObject *object, void *out)
{
        unsigned long long value = PyLong_AsUnsignedLongLong(object);

        if (value == (unsigned long long)-1 && PyErr_Occurred())
                return 0;
        *(uint64_t *)out = value;
        return 1;
}

PyObject *bs_new_bytes(uint64_t size, uint8_t **out)
{
        *out = NULL;
        if (size > PY_SSIZE_T_MAX)
                return PyErr_NoMemory();

        PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);

        if (bytes)
                *out = (uint8_t *)PyBytes_AsString(bytes);
        return bytes;
}

PyObject *bs_bytes_from_bitmap(const uint8_t *bitmap, uint64_t bytes, uint64_t first, uint64_t unit)
{
        uint8_t *packed;
        size_t runs;
        uint64_t size;
        int result = 0;

        Py_BEGIN_ALLOW_THREADS
                runs = bs_bitmap_runs(bitmap, (size_t)bytes);
        Py_END_ALLOW_THREADS
        if (__builtin_mul_overflow(runs, (uint64_t)BS_PACKED_EXTENT_SIZE, &size))
                return PyErr_NoMemory();

        _cleanup_object_ PyObject *extents = bs_new_bytes(size, &packed);

        if (!extents)
                return NULL;
        Py_BEGIN_ALLOW_THREADS
                result = bs_bitmap_extents(bitmap, (size_t)bytes, first, unit, packed);
        Py_END_ALLOW_THREADS
        if (result < 0) {
                PyErr_SetString(PyExc_OverflowError, "the bitmap covers more than 2^64 bytes");
                return NULL;
        }
        return Py_NewRef(extents);
}

PyObject *bs_bytes_from_extents(const struct bs_extents *extents)
{
        uint8_t *packed;
        /* The list exists, so 16 bytes an item fit a size_t. */
        PyObject *bytes = bs_new_bytes((uint64_t)extents->count * BS_PACKED_EXTENT_SIZE, &packed);

        if (bytes)
                bs_extents_pack(extents, packed);
        return bytes;
}
