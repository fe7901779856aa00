/* SPDX-License-Identifier: Apache-2.0 */
/* Files and devices that are read as they are. */
#include "binding.h"

#include "compare.h"
#include "fiemap.h"
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

static const char *which(bool base)
{
        return base ? "the base" : "the later file";
}

static PyObject *finish_diff(int result, const struct bs_python_scan *scan, const struct bs_fiemap_diff *diff)
{
        if (result == -EUCLEAN && !PyErr_Occurred())
                return PyErr_Format(PyExc_ValueError, "the extent map of %s, byte %llu: %s",
                                    which(diff->failed_in_base), (unsigned long long)scan->error.block,
                                    scan->error.reason);
        if (result < 0)
                return bs_raise(result, &scan->error, "", 0);

        _cleanup_object_ PyObject *changed = bs_bytes_from_extents(&diff->changed);
        _cleanup_object_ PyObject *discarded = bs_bytes_from_extents(&diff->discarded);

        if (!changed || !discarded)
                return NULL;
        return Py_BuildValue("(OOKK)", changed, discarded, (unsigned long long)diff->base_records,
                             (unsigned long long)diff->records);
}

static PyObject *fiemap_diff(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff diff = {.records = 0};
        struct bs_python_scan scan;
        struct bs_fiemap base;
        struct bs_fiemap later;
        int base_fd;
        int fd;

        if (!PyArg_ParseTuple(arguments, "ii:fiemap_diff", &base_fd, &fd))
                return NULL;
        bs_scan_begin(&scan);
        int result = bs_fiemap_of_files(&base_fd, &fd, &scan.error, &base, &later);
        if (result == 0)
                result = bs_fiemap_diff(&base, &later, &scan.interrupt, &scan.error, &diff);
        bs_scan_end(&scan);
        return finish_diff(result, &scan, &diff);
}

static PyObject *fiemap_diff_records(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_fiemap_diff_deinit) struct bs_fiemap_diff diff = {.records = 0};
        _cleanup_buffer_ Py_buffer records[2] = {{.buf = NULL}, {.buf = NULL}};
        struct bs_fiemap_replay replays[2];
        struct bs_fiemap maps[2];
        struct bs_python_scan scan;
        uint64_t sizes[2];
        uint64_t at_once;

        if (!PyArg_ParseTuple(arguments, "y*O&y*O&O&:fiemap_diff_records", &records[0], bs_to_u64, &sizes[0],
                              &records[1], bs_to_u64, &sizes[1], bs_to_u64, &at_once))
                return NULL;
        for (size_t i = 0; i < 2; i++) {
                replays[i] = (struct bs_fiemap_replay){
                        records[i].buf, (size_t)records[i].len / sizeof(struct fiemap_extent), at_once};
                maps[i] = (struct bs_fiemap){bs_fiemap_replay_source(&replays[i]), sizes[i]};
        }
        bs_scan_begin(&scan);
        int result = bs_fiemap_diff(&maps[0], &maps[1], &scan.interrupt, &scan.error, &diff);
        bs_scan_end(&scan);
        return finish_diff(result, &scan, &diff);
}

static PyObject *raise_compare(int result, const struct bs_error *error, bool base)
{
        char call[96];
        struct bs_error named = *error;

        if (error->call && strcmp(error->call, "pread") == 0) {
                snprintf(call, sizeof(call), "pread of %s at byte %llu", which(base),
                         (unsigned long long)error->block);
                named.call = call;
        }
        return bs_raise(result, &named, "", 0);
}

static PyObject *compare_files(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_compare_result_deinit) struct bs_compare_result found = {.base_bytes = 0};
        struct bs_python_scan scan;
        struct bs_compare request;

        if (!PyArg_ParseTuple(arguments, "iiO&:compare_files", &request.base_fd, &request.later_fd, bs_to_u64,
                              &request.block_size))
                return NULL;
        bs_scan_begin(&scan);
        int result = bs_compare(&request, &scan.interrupt, &scan.error, &found);
        bs_scan_end(&scan);
        if (result < 0)
                return raise_compare(result, &scan.error, found.failed_in_base);

        _cleanup_object_ PyObject *changed = bs_bytes_from_extents(&found.changed);

        return changed ? Py_BuildValue("(OKK)", changed, (unsigned long long)found.base_bytes,
                                       (unsigned long long)found.later_bytes)
                       : NULL;
}

static PyMethodDef methods[] = {
        {"compare_files", compare_files, METH_VARARGS, NULL},
        {"data_extents", data_extents, METH_VARARGS, NULL},
        {"fiemap_diff", fiemap_diff, METH_VARARGS, NULL},
        {"fiemap_diff_records", fiemap_diff_records, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_file_functions(PyObject *module)
{
        return PyModule_AddFunctions(module, methods);
}
