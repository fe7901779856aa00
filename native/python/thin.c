/* SPDX-License-Identifier: Apache-2.0 */
/* The mapping trees of dm-thin. */
#include "binding.h"

#include "bitmap.h"
#include "ring.h"
#include "thin_diff.h"
#include "thin_scan.h"

static const char THIN_METADATA[] = "thin-pool metadata";

static PyObject *thin_device(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct bs_python_scan scan;
        struct bs_reader reader;
        struct bs_thin_view view;
        uint64_t device_id;
        uint64_t held_root;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&:thin_device", &fd, bs_to_u64, &device_id, bs_to_u64,
                              &held_root))
                return NULL;
        bs_scan_begin(&scan);
        int result = bs_fd_reader_init(&fd, &scan.error, &reader);
        if (result == 0)
                result = bs_thin_find(&reader, held_root, device_id, &scan.interrupt, &scan.error, &view);
        bs_scan_end(&scan);
        if (result < 0)
                return bs_raise(result, &scan.error, THIN_METADATA, device_id);
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
static int scan_device(int fd, struct bs_thin_scan *request, struct bs_python_scan *scan,
                       struct bs_thin_scan_result *out)
{
        _cleanup_(bs_ring_deinit) struct bs_ring ring = {.ring = -1};
        size_t bytes = (size_t)bs_bitmap_bytes(request->nr_chunks);
        struct bs_reader reader;
        int result = bs_ring_reader_init(&ring, fd, &scan->error, &reader);

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

static PyObject *thin_scan(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct bs_python_scan scan;
        struct bs_thin_scan request = {.changed = NULL};
        struct bs_thin_scan_result found;
        int fd, more;

        if (!PyArg_ParseTuple(arguments, "iO&O&O&O&pO&:thin_scan", &fd, bs_to_u64, &request.device_id,
                              bs_to_u64, &request.since, bs_to_u64, &request.first, bs_to_u64,
                              &request.nr_chunks, &more, bs_to_u64, &request.held_root))
                return NULL;
        request.more = more != 0;

        uint64_t bytes = bs_bitmap_bytes(request.nr_chunks);
        _cleanup_object_ PyObject *mapped = bs_new_bytes(bytes, &request.mapped);

        if (!mapped)
                return NULL;
        bs_scan_begin(&scan);
        int result = scan_device(fd, &request, &scan, &found);
        bs_scan_end(&scan);

        _cleanup_free_ uint8_t *changed = request.changed;

        if (result < 0)
                return bs_raise(result, &scan.error, THIN_METADATA, request.device_id);

        _cleanup_object_ PyObject *extents = bs_bytes_from_bitmap(
                changed ? changed : request.mapped, bytes, request.first, found.view.superblock.chunk_size);

        if (!extents)
                return NULL;
        return Py_BuildValue("(OOKK)", extents, mapped, (unsigned long long)found.mappings,
                             (unsigned long long)found.nodes);
}

/* The part of thin_diff without the GIL. */
static int diff_devices(int fd, const struct bs_thin_diff *request, struct bs_python_scan *scan,
                        uint64_t *missing, struct bs_thin_diff_result *out)
{
        _cleanup_(bs_ring_deinit) struct bs_ring ring = {.ring = -1};
        struct bs_reader reader;
        int result = bs_ring_reader_init(&ring, fd, &scan->error, &reader);

        if (result < 0)
                return result;
        return bs_thin_diff(&reader, request, &scan->interrupt, &scan->error, missing, out);
}

static PyObject *thin_diff(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct bs_python_scan scan;
        struct bs_thin_diff request;
        uint64_t missing = 0;
        int fd;

        if (!PyArg_ParseTuple(arguments, "iO&O&O&O&O&:thin_diff", &fd, bs_to_u64, &request.base_id, bs_to_u64,
                              &request.device_id, bs_to_u64, &request.first_chunk, bs_to_u64,
                              &request.end_chunk, bs_to_u64, &request.held_root))
                return NULL;

        _cleanup_(bs_thin_diff_result_deinit) struct bs_thin_diff_result found = {.nodes = 0};

        bs_scan_begin(&scan);
        int result = diff_devices(fd, &request, &scan, &missing, &found);
        bs_scan_end(&scan);
        if (result < 0)
                return bs_raise(result, &scan.error, THIN_METADATA, missing);

        _cleanup_object_ PyObject *changed = bs_bytes_from_extents(&found.changed);
        _cleanup_object_ PyObject *discarded = changed ? bs_bytes_from_extents(&found.discarded) : NULL;

        return discarded ? Py_BuildValue("(OOK)", changed, discarded, (unsigned long long)found.nodes) : NULL;
}

static PyMethodDef methods[] = {
        {"thin_device", thin_device, METH_VARARGS, NULL},
        {"thin_scan", thin_scan, METH_VARARGS, NULL},
        {"thin_diff", thin_diff, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_thin_functions(PyObject *module)
{
        _cleanup_object_ PyObject *no_device = PyLong_FromUnsignedLongLong(BS_THIN_NO_DEVICE);

        if (!no_device || PyModule_AddObjectRef(module, "THIN_NO_DEVICE", no_device) < 0)
                return -1;
        if (PyModule_AddIntConstant(module, "THIN_BLOCK_SIZE", BS_THIN_BLOCK_SIZE) < 0)
                return -1;
        return PyModule_AddFunctions(module, methods);
}
