/* SPDX-License-Identifier: Apache-2.0 */
/* Files and devices that are read as they are. */
#include "binding.h"

#include "seek.h"

static PyObject *data_extents(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_extents_deinit) struct bs_extents extents = {.count = 0};
        struct bs_python_scan scan;
        uint64_t offset;
        uint64_t length;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&:data_extents", &fd, bs_to_u64, &offset, bs_to_u64, &length))
                return NULL;
        bs_scan_begin(&scan);
        int result = bs_data_extents(fd, offset, length, &scan.interrupt, &scan.error, &extents);
        bs_scan_end(&scan);
        if (result < 0)
                return bs_raise(result, &scan.error, "", 0);
        return bs_bytes_from_extents(&extents);
}

static PyMethodDef methods[] = {
        {"data_extents", data_extents, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_file_functions(PyObject *module)
{
        return PyModule_AddFunctions(module, methods);
}
