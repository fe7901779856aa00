/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blocksnap._native: the core for Python. The contract, with the documentation of every function, is
 * blocksnap/_native.pyi. Nothing here keeps state, so any number of interpreters may load it.
 */
#include <Python.h>

#include "bitmap.h"
#include "cleanup.h"
#include "extent.h"
#include "seek.h"
#include "thin_diff.h"
#include "thin_scan.h"

#include <limits.h>
#include <malloc.h>
#include <time.h>

/* How often a scan lets Python look for signals. Taking the GIL can cost 5 ms when others use it. */
enum { SIGNAL_CHECK_NANOSECONDS = 50000000 };

static const char THIN_METADATA[] = "thin-pool metadata";

static void release_object(PyObject **object)
{
        Py_XDECREF(*object);
}

static void release_buffer(Py_buffer *view)
{
        /* Does nothing for a view that was never filled. */
        PyBuffer_Release(view);
}

#define _cleanup_object_ _cleanup_(release_object)
#define _cleanup_buffer_ _cleanup_(release_buffer)

/* A scan that runs without the GIL. */
struct python_scan {
        PyThreadState *state;
        struct timespec checked;
        struct bs_interrupt interrupt;
        struct bs_error error;
};

static int check_signals(void *context)
{
        struct python_scan *scan = context;
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

static void scan_begin(struct python_scan *scan)
{
        *scan = (struct python_scan){.interrupt = {.check = check_signals, .context = scan}};
        clock_gettime(CLOCK_MONOTONIC, &scan->checked);
        scan->state = PyEval_SaveThread();
}

static void scan_end(struct python_scan *scan)
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

/*
 * Turn what a core function returned into an exception; error.h says what is set when. `metadata` is what was
 * read, and `key` what was looked up in it.
 */
static PyObject *raise_error(int result, const struct bs_error *error, const char *metadata, uint64_t key)
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

/* PyArg_ParseTuple's own K does not notice overflow. */
static int to_u64(PyObject *object, void *out)
{
        unsigned long long value = PyLong_AsUnsignedLongLong(object);

        if (value == (unsigned long long)-1 && PyErr_Occurred())
                return 0;
        *(uint64_t *)out = value;
        return 1;
}

/* A new bytes object of `size` bytes with undefined content; `*out` points to it. */
static PyObject *new_bytes(uint64_t size, uint8_t **out)
{
        *out = NULL;
        if (size > PY_SSIZE_T_MAX)
                return PyErr_NoMemory();

        PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);

        if (bytes)
                *out = (uint8_t *)PyBytes_AsString(bytes);
        return bytes;
}

static PyObject *bytes_from_bitmap(const uint8_t *bitmap, uint64_t bytes, uint64_t unit)
{
        uint8_t *packed;
        size_t runs;
        uint64_t size;
        int result = 0;

        Py_BEGIN_ALLOW_THREADS runs = bs_bitmap_runs(bitmap, (size_t)bytes);
        Py_END_ALLOW_THREADS if (__builtin_mul_overflow(runs, (uint64_t)BS_PACKED_EXTENT_SIZE,
                                                        &size)) return PyErr_NoMemory();

        _cleanup_object_ PyObject *extents = new_bytes(size, &packed);

        if (!extents)
                return NULL;
        Py_BEGIN_ALLOW_THREADS result = bs_bitmap_extents(bitmap, (size_t)bytes, unit, packed);
        Py_END_ALLOW_THREADS if (result < 0)
        {
                PyErr_SetString(PyExc_OverflowError, "the bitmap covers more than 2^64 bytes");
                return NULL;
        }
        return Py_NewRef(extents);
}

static PyObject *bytes_from_extents(const struct bs_extents *extents)
{
        uint8_t *packed;
        /* The list exists, so 16 bytes an item fit a size_t. */
        PyObject *bytes = new_bytes((uint64_t)extents->count * BS_PACKED_EXTENT_SIZE, &packed);

        if (bytes)
                bs_extents_pack(extents, packed);
        return bytes;
}

static PyObject *native_thin_device(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct python_scan scan;
        struct bs_reader reader;
        struct bs_thin_view view;
        uint64_t device_id;
        uint64_t held_root;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&:thin_device", &fd, to_u64, &device_id, to_u64, &held_root))
                return NULL;
        scan_begin(&scan);
        int result = bs_fd_reader_init(&fd, &scan.error, &reader);
        if (result == 0)
                result = bs_thin_find(&reader, held_root, device_id, &scan.interrupt, &scan.error, &view);
        scan_end(&scan);
        if (result < 0)
                return raise_error(result, &scan.error, THIN_METADATA, device_id);
        return Py_BuildValue(
                "(IKIKKKKKKKKI)", (unsigned)view.superblock.time,
                (unsigned long long)view.superblock.transaction_id, (unsigned)view.superblock.flags,
                (unsigned long long)view.superblock.held_root, (unsigned long long)view.superblock.chunk_size,
                (unsigned long long)view.superblock.metadata_blocks,
                (unsigned long long)view.superblock.mapping_root,
                (unsigned long long)view.superblock.details_root, (unsigned long long)view.device.root,
                (unsigned long long)view.device.mapped_blocks, (unsigned long long)view.device.transaction_id,
                (unsigned)view.device.creation_time);
}

/* The part of thin_scan without the GIL. With `since` 0 all that is mapped is changed: one bitmap does. */
static int scan_device(int fd, struct bs_thin_scan *request, struct python_scan *scan,
                       struct bs_thin_scan_result *out)
{
        size_t bytes = (size_t)bs_bitmap_bytes(request->nr_chunks);
        struct bs_reader reader;
        int result = bs_fd_reader_init(&fd, &scan->error, &reader);

        if (result < 0)
                return result;
        memset(request->mapped, 0, bytes);
        if (request->since > 0) {
                request->changed = bs_alloc_zeroed(bytes);
                if (!request->changed)
                        return -ENOMEM;
        }
        return bs_thin_scan(&reader, request, &scan->interrupt, &scan->error, out);
}

static PyObject *native_thin_scan(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct python_scan scan;
        struct bs_thin_scan request = {.changed = NULL};
        struct bs_thin_scan_result found;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&O&O&:thin_scan", &fd, to_u64, &request.device_id, to_u64,
                              &request.since, to_u64, &request.nr_chunks, to_u64, &request.held_root))
                return NULL;

        uint64_t bytes = bs_bitmap_bytes(request.nr_chunks);
        _cleanup_object_ PyObject *mapped = new_bytes(bytes, &request.mapped);

        if (!mapped)
                return NULL;
        scan_begin(&scan);
        int result = scan_device(fd, &request, &scan, &found);
        scan_end(&scan);

        _cleanup_free_ uint8_t *changed = request.changed;

        if (result < 0)
                return raise_error(result, &scan.error, THIN_METADATA, request.device_id);

        _cleanup_object_ PyObject *extents = bytes_from_bitmap(changed ? changed : request.mapped, bytes,
                                                               found.view.superblock.chunk_size);

        if (!extents)
                return NULL;
        return Py_BuildValue("(OOK)", extents, mapped, (unsigned long long)found.nodes);
}

static PyObject *native_thin_diff(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct python_scan scan;
        struct bs_reader reader;
        struct bs_thin_diff request;
        uint64_t missing = 0;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&O&O&O&:thin_diff", &fd, to_u64, &request.base_id, to_u64,
                              &request.device_id, to_u64, &request.first_chunk, to_u64, &request.end_chunk,
                              to_u64, &request.held_root))
                return NULL;

        _cleanup_(bs_thin_diff_result_deinit) struct bs_thin_diff_result found = {.nodes = 0};

        scan_begin(&scan);
        int result = bs_fd_reader_init(&fd, &scan.error, &reader);
        if (result == 0)
                result = bs_thin_diff(&reader, &request, &scan.interrupt, &scan.error, &missing, &found);
        scan_end(&scan);
        if (result < 0)
                return raise_error(result, &scan.error, THIN_METADATA, missing);

        _cleanup_object_ PyObject *changed = bytes_from_extents(&found.changed);
        _cleanup_object_ PyObject *discarded = changed ? bytes_from_extents(&found.discarded) : NULL;

        return discarded ? Py_BuildValue("(OOK)", changed, discarded, (unsigned long long)found.nodes) : NULL;
}

static PyObject *native_bitmap_extents(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer bitmap = {.buf = NULL};
        uint64_t unit;

        if (!PyArg_ParseTuple(arguments, "y*O&:bitmap_extents", &bitmap, to_u64, &unit))
                return NULL;
        if (unit == 0) {
                PyErr_SetString(PyExc_ValueError, "unit has to be positive");
                return NULL;
        }
        return bytes_from_bitmap(bitmap.buf, (uint64_t)bitmap.len, unit);
}

static PyObject *native_bitmap_subtract(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer a = {.buf = NULL};
        _cleanup_buffer_ Py_buffer b = {.buf = NULL};
        uint8_t *out;

        if (!PyArg_ParseTuple(arguments, "y*y*:bitmap_subtract", &a, &b))
                return NULL;

        PyObject *difference = new_bytes((uint64_t)a.len, &out);

        if (!difference)
                return NULL;
        Py_BEGIN_ALLOW_THREADS bs_bitmap_subtract(a.buf, (size_t)a.len, b.buf, (size_t)b.len, out);
        Py_END_ALLOW_THREADS return difference;
}

static PyObject *native_bitmap_update(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_buffer_ Py_buffer old = {.buf = NULL};
        _cleanup_buffer_ Py_buffer set = {.buf = NULL};
        _cleanup_buffer_ Py_buffer clear = {.buf = NULL};
        uint64_t bits;
        uint64_t unit;
        uint8_t *out;

        if (!PyArg_ParseTuple(arguments, "y*O&O&y*y*:bitmap_update", &old, to_u64, &bits, to_u64, &unit, &set,
                              &clear))
                return NULL;
        if (unit == 0 || set.len % BS_PACKED_EXTENT_SIZE || clear.len % BS_PACKED_EXTENT_SIZE) {
                PyErr_SetString(PyExc_ValueError,
                                "unit has to be positive, and packed extents 16 bytes each");
                return NULL;
        }

        uint64_t bytes = bs_bitmap_bytes(bits);
        size_t kept = (uint64_t)old.len < bytes ? (size_t)old.len : (size_t)bytes;
        _cleanup_object_ PyObject *bitmap = new_bytes(bytes, &out);
        int result;

        if (!bitmap)
                return NULL;
        Py_BEGIN_ALLOW_THREADS memset(out + kept, 0, (size_t)bytes - kept);
        memcpy(out, old.buf, kept);
        bs_bitmap_fill(out, bits, bytes * 8 - bits, false);
        result =
                bs_bitmap_apply(out, bits, unit, clear.buf, (size_t)clear.len / BS_PACKED_EXTENT_SIZE, false);
        if (result == 0)
                result = bs_bitmap_apply(out, bits, unit, set.buf, (size_t)set.len / BS_PACKED_EXTENT_SIZE,
                                         true);
        Py_END_ALLOW_THREADS if (result < 0)
        {
                PyErr_SetString(PyExc_OverflowError, "an extent ends beyond 2^64 bytes");
                return NULL;
        }
        return Py_NewRef(bitmap);
}

static PyObject *native_data_extents(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_extents_deinit) struct bs_extents extents = {.count = 0};
        struct python_scan scan;
        uint64_t offset;
        uint64_t length;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&:data_extents", &fd, to_u64, &offset, to_u64, &length))
                return NULL;
        scan_begin(&scan);
        int result = bs_data_extents(fd, offset, length, &scan.interrupt, &scan.error, &extents);
        scan_end(&scan);
        if (result < 0)
                return raise_error(result, &scan.error, "", 0);
        return bytes_from_extents(&extents);
}

static PyObject *native_retain_memory(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        uint64_t limit;

        if (!PyArg_ParseTuple(arguments, "O&:retain_memory", to_u64, &limit))
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

static PyMethodDef methods[] = {
        {"thin_device", native_thin_device, METH_VARARGS, NULL},
        {"thin_scan", native_thin_scan, METH_VARARGS, NULL},
        {"thin_diff", native_thin_diff, METH_VARARGS, NULL},
        {"bitmap_extents", native_bitmap_extents, METH_VARARGS, NULL},
        {"bitmap_subtract", native_bitmap_subtract, METH_VARARGS, NULL},
        {"bitmap_update", native_bitmap_update, METH_VARARGS, NULL},
        {"data_extents", native_data_extents, METH_VARARGS, NULL},
        {"retain_memory", native_retain_memory, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
        _cleanup_object_ PyObject *no_device = PyLong_FromUnsignedLongLong(BS_THIN_NO_DEVICE);

        if (!no_device || PyModule_AddObjectRef(module, "THIN_NO_DEVICE", no_device) < 0)
                return -1;
        return PyModule_AddIntConstant(module, "THIN_BLOCK_SIZE", BS_THIN_BLOCK_SIZE);
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
