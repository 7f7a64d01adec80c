// The module fastopt._C.
#include <map>

#include "plan/after_backward.h"
#include "plan/plan.h"
#include "plan/threads.h"

namespace fastopt {
namespace {

const Answers* answers;

const Algorithm& find_algorithm(const std::string& name) {
  for (const Algorithm& algorithm : algorithms())
    if (name == algorithm.name) return algorithm;
  raise(PyExc_ValueError, "no update named '" + name + "'");
}

// A plan as the Python object that an optimizer holds. A copy or a pickle of it is None: the copy makes its own.
struct PlanObject {
  PyObject_HEAD
  Plan* plan;
};
PyTypeObject* plan_type;

PyTypeObject* make_plan_type() {
  static PyMethodDef methods[] = {
      {"__reduce__", [](PyObject*, PyObject*) { return Py_BuildValue("O()", Py_TYPE(Py_None)); }, METH_NOARGS, nullptr}, {}};
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(+[](PyObject* self) {
         PyTypeObject* type = Py_TYPE(self);
         delete reinterpret_cast<PlanObject*>(self)->plan;
         type->tp_free(self);
         Py_DECREF(type);
       })},
      {Py_tp_methods, methods}, {}};
  static PyType_Spec spec = {"fastopt._C.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, slots};
  return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
}

// The optimizer's own plan, made at its first step.
py::object plan_of(PyObject* self) {
  py::object found = attribute(self, names::plan);
  if (Py_TYPE(found.ptr()) != plan_type) {
    const Algorithm& algorithm = find_algorithm(py::cast<std::string>(attribute(attribute(self, names::fastopt).ptr(), names::update)));
    found = py::reinterpret_steal<py::object>(plan_type->tp_alloc(plan_type, 0));
    if (!found) throw python_error();
    reinterpret_cast<PlanObject*>(found.ptr())->plan = new Plan(algorithm);
    if (PyObject_SetAttr(self, names::plan, found.ptr())) throw python_error();
  }
  return found;
}
Plan& plan_in(const py::object& found) { return *reinterpret_cast<PlanObject*>(found.ptr())->plan; }

PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto optional = [&](Py_ssize_t at) { return count > at && args[at] != Py_None ? args[at] : nullptr; };
  PyObject* const fresh = optional(1);
  if (count < 1 || count > 3 || (fresh && !PyList_Check(fresh))) raise(PyExc_TypeError, "step(optimizer, fresh, extras)");
  const Extras extras(optional(2));
  const py::object plan = plan_of(args[0]);       // held: the user's code may drop the optimizer's
  return plan_in(plan).step(args[0], fresh, extras, *answers).release().ptr();
  END_HANDLE_TH_ERRORS
}
PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)), METH_FASTCALL,
                           "step(optimizer, fresh=None, extras=None): see csrc/plan/answer.h and fastopt/extras.py"};

// A function of after_backward.h, with the number of its arguments.
template <PyObject* (*function)(const Answers&, PyObject* const*), Py_ssize_t expected>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != expected) raise(PyExc_TypeError, c10::str("takes ", expected, " arguments"));
  try {
    return function(*answers, args);
  } catch (const Outside& outside) {
    return answers->left_to_torch({PyUnicode_FromString(outside.reason)}).release().ptr();
  }
  END_HANDLE_TH_ERRORS
}
template <auto function, Py_ssize_t expected> PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function, expected>)), METH_FASTCALL, "see csrc/plan/after_backward.h"};
}
PyMethodDef gradient_methods[] = {method<&clip_grad_norm, 4>("clip_grad_norm_"), method<&total_norm, 3>("total_norm"),
                                  method<&norm, 2>("norm"), method<&search, 2>("search"), method<&scale, 2>("scale_"),
                                  method<&scale_grads, 3>("scale_grads_"), method<&clip_grad_value, 2>("clip_grad_value_"),
                                  method<&average, 4>("average_"), method<&zero_grad, 2>("zero_grad"), {}};

PyObject* watched(PyObject*, PyObject*) { return PyBool_FromLong(is_watched()); }
PyMethodDef watched_method = {"watched", &watched, METH_NOARGS, "watched(): whether torch is being profiled or observed"};

const char* set_isa(const std::string& name) {
  const char* before = isa->name;
  std::string known;
  for (int i = 0; i < isa_count; i++) {
    if (name == isas[i].name && isas[i].supported()) return isa = &isas[i], before;
    known += (i ? ", " : "") + (isas[i].name + std::string(isas[i].supported() ? "" : " (not on this processor)"));
  }
  raise(PyExc_ValueError, "ISA '" + name + "' is not available here; there are: " + known);
}

}  // namespace
}  // namespace fastopt

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastopt;
  answers = new Answers();
  for (const AnswerType* type : {&answers->done, &answers->launches, &answers->wants, &answers->missing, &answers->shards, &answers->left_to_torch,
                                 &answers->launch, &answers->want, &answers->gpu_pass, &answers->gpu_part}) {
    const py::handle type_object = reinterpret_cast<PyObject*>(type->type);
    m.attr(type_object.attr("__name__")) = type_object;
  }
  m.attr("DONE") = py::handle(answers->DONE);
  plan_type = make_plan_type();
  if (!plan_type) throw py::error_already_set();
  m.attr("torch_version") = FASTOPT_TORCH_VERSION;
  py::object step_function = py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, nullptr));
  m.attr("step") = step_function;
  m.attr("watched") = py::reinterpret_steal<py::object>(PyCFunction_New(&watched_method, nullptr));
  if (PyModule_AddFunctions(m.ptr(), gradient_methods)) throw py::error_already_set();
  m.def("isas", [] {
    std::vector<std::string> found;
    for (int i = 0; i < isa_count; i++)
      if (isas[i].supported()) found.push_back(isas[i].name);
    return found;
  });
  m.def("isa", [] { return isa->name; });
  m.def("set_isa", &set_isa);
  m.attr("gpu_chunk") = chunk;
  m.attr("dtypes") = std::vector<std::string>(dtype_names, dtype_names + dtype_count);
  m.def("gpu_type", [] { return c10::DeviceTypeName(gpu_type, true); });
  m.def("set_gpu_type", [](const std::string& type) { gpu_type = c10::Device(type).type(); });
  m.def("set_buffer", [](py::object optimizer, size_t image, int64_t words, int64_t address) {
    plan_in(plan_of(optimizer.ptr())).set_buffer(image, words, address);
  });
  m.def("take_back", [](py::object optimizer, size_t image) { plan_in(plan_of(optimizer.ptr())).take_back(image); });
  m.def("norm_of", [](py::object optimizer, const std::vector<size_t>& places) { return plan_in(plan_of(optimizer.ptr())).norm_of(places); });
  m.def("take_only_averaged", [](py::object optimizer) { return plan_in(plan_of(optimizer.ptr())).take_only_averaged(); });
  m.def("grad_norm", [](py::object optimizer) {
    at::Tensor norm = plan_in(plan_of(optimizer.ptr())).grad_norm();
    return norm.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(norm))) : py::none();
  });
  m.def("counters", [] { return std::map<std::string, int64_t>{{"allocations", allocations}, {"checks", Walk::checks}}; });
  m.def("algorithms", [] {
    std::map<std::string, std::vector<std::string>> slots;
    for (const Algorithm& a : algorithms()) slots[a.name].assign(a.slot_names, a.slot_names + a.slots);
    return slots;
  });
}
