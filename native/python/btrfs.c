/* SPDX-License-Identifier: Apache-2.0 */
/* The trees of btrfs subvolumes. */
#include "binding.h"

#include "btrfs_diff.h"

static PyObject *raise_btrfs(int result, const struct bs_error *error)
{
        if (result == -EUCLEAN && !PyErr_Occurred())
                return PyErr_Format(PyExc_ValueError, "inode %llu: %s", (unsigned long long)error->block,
                                    error->reason);
        return bs_raise(result, error, "", 0);
}

static PyObject *bytes_of(const struct bs_bytes *bytes)
{
        return PyBytes_FromStringAndSize((const char *)bytes->data, (Py_ssize_t)bytes->count);
}

static PyObject *btrfs_touched(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_btrfs_touched_deinit) struct bs_btrfs_touched found = {.items = 0};
        struct bs_python_scan scan;
        struct bs_btrfs_source tree;
        uint64_t since;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&:btrfs_touched", &fd, bs_to_u64, &since))
                return NULL;
        bs_btrfs_fd_source_init(&fd, &tree);
        bs_scan_begin(&scan);
        int result = bs_btrfs_touched(&tree, since, &scan.interrupt, &scan.error, &found);
        bs_scan_end(&scan);
        if (result < 0)
                return raise_btrfs(result, &scan.error);

        _cleanup_object_ PyObject *numbers = bytes_of(&found.numbers);
        _cleanup_object_ PyObject *transactions = bytes_of(&found.transactions);
        _cleanup_object_ PyObject *modes = bytes_of(&found.modes);

        if (!numbers || !transactions || !modes)
                return NULL;
        return Py_BuildValue("(OOOK)", numbers, transactions, modes, (unsigned long long)found.items);
}

static PyObject *btrfs_diff(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_bytes_deinit) struct bs_bytes records = {.data = NULL};
        _cleanup_buffer_ Py_buffer numbers = {.buf = NULL};
        _cleanup_buffer_ Py_buffer memory = {.buf = NULL};
        struct bs_python_scan scan;
        struct bs_btrfs_source tree;
        struct bs_btrfs_source base;
        uint64_t block;
        uint64_t limit;
        size_t done;
        int remember;
        int base_fd;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iiy*y*O&pO&:btrfs_diff", &fd, &base_fd, &numbers, &memory,
                              bs_to_u64, &block, &remember, bs_to_u64, &limit))
                return NULL;
        if (numbers.len % 8 || block > UINT32_MAX || limit == 0) {
                PyErr_SetString(PyExc_ValueError,
                                "numbers are 8 bytes each, a sector has 32 bits, and a limit is positive");
                return NULL;
        }
        bs_btrfs_fd_source_init(&fd, &tree);
        bs_btrfs_fd_source_init(&base_fd, &base);

        const struct bs_btrfs_diff request = {
                .tree = &tree,
                .base = base_fd < 0 ? NULL : &base,
                .numbers = numbers.buf,
                .count = (size_t)numbers.len / 8,
                .memory = {.data = memory.buf, .left = (size_t)memory.len},
                .block = (uint32_t)block,
                .remember = remember != 0,
                .limit = limit < SIZE_MAX ? (size_t)limit : SIZE_MAX,
        };

        bs_scan_begin(&scan);
        int result = bs_btrfs_diff(&request, &scan.interrupt, &scan.error, &records, &done);
        bs_scan_end(&scan);
        if (result < 0)
                return raise_btrfs(result, &scan.error);

        _cleanup_object_ PyObject *packed = bytes_of(&records);

        return packed ? Py_BuildValue("(On)", packed, (Py_ssize_t)done) : NULL;
}

static PyObject *btrfs_diff_file(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        _cleanup_(bs_btrfs_file_diff_deinit) struct bs_btrfs_file_diff found = {.size = 0};
        struct bs_python_scan scan;
        struct bs_btrfs_source trees[2];
        struct bs_btrfs_file old = {.tree = &trees[0]};
        struct bs_btrfs_file present = {.tree = &trees[1]};
        uint64_t block;
        int base_fd;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&iO&O&:btrfs_diff_file", &base_fd, bs_to_u64, &old.inode, &fd,
                              bs_to_u64, &present.inode, bs_to_u64, &block))
                return NULL;
        if (block < 512 || block > UINT32_MAX || block & (block - 1)) {
                PyErr_SetString(PyExc_ValueError, "a sector size is a power of two, and 512 or more");
                return NULL;
        }
        bs_btrfs_fd_source_init(&base_fd, &trees[0]);
        bs_btrfs_fd_source_init(&fd, &trees[1]);
        bs_scan_begin(&scan);
        int result =
                bs_btrfs_diff_file(&old, &present, (uint32_t)block, &scan.interrupt, &scan.error, &found);
        bs_scan_end(&scan);
        if (result < 0)
                return raise_btrfs(result, &scan.error);

        _cleanup_object_ PyObject *changed = bs_bytes_from_extents(&found.changed);
        _cleanup_object_ PyObject *holes = bs_bytes_from_extents(&found.holes);
        _cleanup_object_ PyObject *state = bytes_of(&found.state);

        if (!changed || !holes || !state)
                return NULL;
        return Py_BuildValue("(OOOK)", changed, holes, state, (unsigned long long)found.size);
}

static PyMethodDef methods[] = {
        {"btrfs_diff", btrfs_diff, METH_VARARGS, NULL},
        {"btrfs_diff_file", btrfs_diff_file, METH_VARARGS, NULL},
        {"btrfs_touched", btrfs_touched, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_btrfs_functions(PyObject *module)
{
        return PyModule_AddFunctions(module, methods);
}
