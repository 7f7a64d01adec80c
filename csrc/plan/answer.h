// What a step answers: classes that Python tells apart by type, each a tuple with named fields.
//
//   DONE                    the step is done; it is empty, and so false
//   Launches(launches)      done on the CPU; fastopt/gpu.py uploads and launches these
//   Wants(wants)            kernels or buffers are wanted first (nothing was written; set_buffer, call again)
//   Missing(params)         these (group, param) want their state made first (nothing was written; call again)
//   Shards(params)          some of these are DTensors, so that the norm is of several processes: on the CPU norm_of() has what is here (nothing
//                           was written; call again with the norm)
//   GpuPass(...)            a pass over GPU tensors is left for fastopt/gpu_passes.py (nothing was written)
//   LeftToTorch(reason)     not for this library: torch's own step, or function, shall run (nothing was written)
#pragma once
#include <initializer_list>

#include "plan/python.h"

namespace fastopt {

class AnswerType {
 public:
  AnswerType(const char* name, const char* doc, std::initializer_list<const char*> names) {
    PyStructSequence_Field fields[16] = {};
    int count = 0;
    for (const char* field : names) fields[count++].name = field;
    PyStructSequence_Desc description = {name, doc, fields, count};
    type = PyStructSequence_NewType(&description);
    if (!type) throw python_error();
  }
  // Takes the values.
  py::object operator()(std::initializer_list<PyObject*> values) const {
    py::object made = py::reinterpret_steal<py::object>(PyStructSequence_New(type));
    Py_ssize_t at = 0;
    bool failed = !made;
    for (PyObject* value : values) {
      failed |= !value;
      if (made) PyStructSequence_SetItem(made.ptr(), at++, value);
      else Py_XDECREF(value);
    }
    if (failed) throw python_error();
    return made;
  }
  PyTypeObject* type;
};

struct Answers {
  AnswerType done{"fastopt._C.Done", "the step is done", {}};
  AnswerType launches{"fastopt._C.Launches", "done on the CPU; these are left for the GPU", {"launches"}};
  AnswerType wants{"fastopt._C.Wants", "kernels or buffers to make before the next call", {"wants"}};
  AnswerType missing{"fastopt._C.Missing", "(group, param) pairs whose state is to be made before the next call", {"params"}};
  AnswerType shards{"fastopt._C.Shards", "parameters whose norm is of several processes", {"params"}};
  AnswerType left_to_torch{"fastopt._C.LeftToTorch", "why torch's own step, or function, shall run", {"reason"}};
  AnswerType launch{"fastopt._C.Launch", "an image to upload and launch; places and sizes in words of 8 bytes",
                    {"image", "programs", "table_at", "scalars_at", "changed_from", "changed_to", "address", "prepared", "hypers_at"}};
  AnswerType want{"fastopt._C.Want", "an image without a kernel or with too small a buffer",
                  {"image", "device", "used", "param", "state", "capturable", "averages", "grad", "companions", "draws", "words"}};
  AnswerType gpu_pass{"fastopt._C.GpuPass", "an image to upload and passes to launch; places and sizes in words of 8 bytes",
                      {"image", "device", "parts", "programs", "table_at", "words", "changed_from", "changed_to", "version", "address",
                       "number", "norm", "order"}};
  AnswerType gpu_part{"fastopt._C.GpuPart", "the programs for tensors of one dtype", {"dtype", "first", "programs"}};
  PyObject* DONE = done({}).release().ptr();
};

}  // namespace fastopt
