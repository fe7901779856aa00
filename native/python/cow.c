/* SPDX-License-Identifier: Apache-2.0 */
/* The exception store of a classic LVM snapshot. */
#include "binding.h"

#include "cow.h"
#include "ring.h"

/* The extents of a result, packed. */
static PyObject *pack(const struct bs_cow_result *result)
{
        uint8_t *packed;
        size_t count;

        Py_BEGIN_ALLOW_THREADS
                count = bs_cow_extent_count(result);
        Py_END_ALLOW_THREADS

        /* There are no more extents than chunks in the list, twice of which in bytes fit a size_t. */
        PyObject *extents = bs_new_bytes((uint64_t)count * BS_PACKED_EXTENT_SIZE, &packed);

        if (extents) {
                Py_BEGIN_ALLOW_THREADS
                        bs_cow_extents_pack(result, packed);
                Py_END_ALLOW_THREADS
        }
        return extents;
}

static PyObject *cow_scan(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_ring_deinit) struct bs_ring ring = {.ring = -1};
        _cleanup_(bs_cow_result_deinit) struct bs_cow_result found = {.chunks = NULL};
        struct bs_python_scan scan;
        struct bs_cow_scan request = {.attempts = BS_COW_ATTEMPTS};
        struct bs_reader reader;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&:cow_scan", &fd, bs_to_u64, &request.origin_size, bs_to_u64,
                              &request.settled_areas))
                return NULL;
        bs_scan_begin(&scan);
        int result = bs_ring_reader_init(&ring, fd, &scan.error, &reader);
        if (result == 0)
                result = bs_cow_scan(&reader, &request, &scan.interrupt, &scan.error, &found);
        bs_scan_end(&scan);
        if (result < 0)
                return bs_raise(result, &scan.error, "exception store", 0);

        _cleanup_object_ PyObject *extents = pack(&found);

        if (!extents)
                return NULL;
        return Py_BuildValue("(OKKKK)", extents, (unsigned long long)found.chunk_size,
                             (unsigned long long)found.count, (unsigned long long)found.areas,
                             (unsigned long long)found.allocated);
}

static PyMethodDef methods[] = {
        {"cow_scan", cow_scan, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_cow_functions(PyObject *module)
{
        return PyModule_AddFunctions(module, methods);
}
