/* SPDX-License-Identifier: Apache-2.0 */
/* What a btrfs send stream changes. */
#include "binding.h"

#include "btrfs_send.h"
#include "btrfs_steps.h"

static PyObject *text_object(const struct bs_steps *steps, const struct bs_text *text)
{
        const char *from = text->length > 0 ? (const char *)steps->text + text->offset : "";

        return PyBytes_FromStringAndSize(from, (Py_ssize_t)text->length);
}

/* The ranges of a step, packed as they came; None when it has none. */
static PyObject *ranges_object(const struct bs_steps *steps, const struct bs_step *step)
{
        uint8_t *packed;

        if (step->range_count == 0)
                return Py_NewRef(Py_None);

        /* They exist, so 16 bytes each fit a size_t. */
        PyObject *bytes = bs_new_bytes((uint64_t)step->range_count * BS_PACKED_EXTENT_SIZE, &packed);

        if (!bytes)
                return NULL;
        for (size_t i = 0; i < step->range_count; i++) {
                const struct bs_extent *range = &steps->ranges[step->first_range + i];

                bs_extent_pack(range->offset, range->length, packed + i * BS_PACKED_EXTENT_SIZE);
        }
        return bytes;
}

static PyObject *step_object(const struct bs_steps *steps, const struct bs_step *step)
{
        _cleanup_object_ PyObject *path = text_object(steps, &step->path);
        _cleanup_object_ PyObject *other = path ? text_object(steps, &step->other) : NULL;
        _cleanup_object_ PyObject *ranges = other ? ranges_object(steps, step) : NULL;

        if (!ranges)
                return NULL;
        return Py_BuildValue("(iOOKO)", (int)step->kind, path, other, (unsigned long long)step->number,
                             ranges);
}

static PyObject *steps_object(const struct bs_steps *steps)
{
        PyObject *list = PyList_New((Py_ssize_t)steps->count);

        for (size_t i = 0; list && i < steps->count; i++) {
                PyObject *step = step_object(steps, &steps->items[i]);

                /* The list takes the step over, also when this fails. */
                if (!step || PyList_SetItem(list, (Py_ssize_t)i, step) < 0)
                        Py_CLEAR(list);
        }
        return list;
}

static PyObject *raise_error(int result, const struct bs_error *error)
{
        if (result == -EUCLEAN && !PyErr_Occurred())
                return PyErr_Format(PyExc_ValueError, "send stream, byte %llu: %s",
                                    (unsigned long long)error->block, error->reason);
        return bs_raise(result, error, "send stream", 0);
}

static PyObject *btrfs_send(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct bs_python_scan scan;
        struct bs_send_request request;
        struct bs_sender sender;
        _cleanup_(bs_steps_deinit) struct bs_steps steps = {.count = 0};
        uint64_t commands;
        uint64_t version;

        if (!PyArg_ParseTuple(arguments, "iO&O&:btrfs_send", &request.subvolume, bs_to_u64,
                              &request.parent_tree, bs_to_u64, &version))
                return NULL;
        request.version = version < UINT32_MAX ? (uint32_t)version : UINT32_MAX;
        bs_kernel_sender_init(&request, &sender);
        bs_scan_begin(&scan);
        int result = bs_send_run(&sender, bs_steps_take, &steps, &scan.interrupt, &scan.error, &commands);
        bs_scan_end(&scan);
        return result < 0 ? raise_error(result, &scan.error) : steps_object(&steps);
}

static int read_all(const Py_buffer *view, struct bs_steps *steps, struct bs_error *error)
{
        struct bs_stream stream;
        int result = bs_stream_init(&stream, bs_steps_take, steps, error);

        if (result == 0)
                result = bs_stream_push(&stream, view->buf, (size_t)view->len);
        if (result == 0)
                result = bs_stream_finish(&stream);
        bs_stream_deinit(&stream);
        return result;
}

static PyObject *btrfs_send_steps(PyObject *Py_UNUSED(module), PyObject *arguments)
{
        struct bs_python_scan scan;
        _cleanup_buffer_ Py_buffer view = {.obj = NULL};
        _cleanup_(bs_steps_deinit) struct bs_steps steps = {.count = 0};

        if (!PyArg_ParseTuple(arguments, "y*:btrfs_send_steps", &view))
                return NULL;
        bs_scan_begin(&scan);
        int result = read_all(&view, &steps, &scan.error);
        bs_scan_end(&scan);
        return result < 0 ? raise_error(result, &scan.error) : steps_object(&steps);
}

static PyMethodDef methods[] = {
        {"btrfs_send", btrfs_send, METH_VARARGS, NULL},
        {"btrfs_send_steps", btrfs_send_steps, METH_VARARGS, NULL},
        {NULL, NULL, 0, NULL},
};

int bs_add_btrfs_send_functions(PyObject *module)
{
        static const struct {
                const char *name;
                enum bs_step_kind kind;
        } kinds[] = {
                {"STEP_CREATE", BS_STEP_CREATE}, {"STEP_CREATE_DIRECTORY", BS_STEP_CREATE_DIRECTORY},
                {"STEP_RENAME", BS_STEP_RENAME}, {"STEP_LINK", BS_STEP_LINK},
                {"STEP_REMOVE", BS_STEP_REMOVE}, {"STEP_DATA", BS_STEP_DATA},
                {"STEP_HOLE", BS_STEP_HOLE},     {"STEP_RESIZE", BS_STEP_RESIZE},
                {"STEP_TOUCH", BS_STEP_TOUCH},
        };

        for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
                if (PyModule_AddIntConstant(module, kinds[i].name, kinds[i].kind) < 0)
                        return -1;
        }
        return PyModule_AddFunctions(module, methods);
}
