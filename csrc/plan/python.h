// Python objects: errors, names, attributes, and looking keys up in dicts without a search.
//
// What runs code of the user's says so: what was borrowed from a container before may be gone after it.
#pragma once
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace fastopt {

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw python_error();
}

// Thrown: torch's own step shall run, for this reason.
struct Outside { const char* reason; };

// Names, made when the module is loaded.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }
namespace names {
inline PyObject *const param_groups = interned("param_groups"), *const params = interned("params"), *const state = interned("state"),
                *const step = interned("step"), *const capturable = interned("capturable"), *const differentiable = interned("differentiable"),
                *const plan = interned("_fastopt_plan"), *const fastopt = interned("_fastopt"), *const update = interned("update"),
                *const torchs_step_because = interned("torchs_step_because"), *const keys = interned("keys"), *const grad = interned("grad"),
                *const torch_function = interned("__torch_function__"), *const mesh = interned("mesh"), *const placements = interned("placements"),
                *const ema = interned("ema"), *const remainder = interned("remainder"), *const master = interned("master"),
                *const rounding_seed = interned("rounding_seed"), *const get_coordinate = interned("get_coordinate"),
                *const size = interned("size"), *const is_replicate = interned("is_replicate"),
                *const options = interned("_fastopt_options"), *const refuse_parts = interned("refuse_parts");
}

// May run code of the user's.
inline py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) throw python_error();
  return py::reinterpret_steal<py::object>(value);
}

// May run code of the user's.
inline bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw python_error();
  return truth;
}

// Whether looking a key up in the object is looking it up in the dict that it is.
inline bool is_dict(PyObject* object) {
  return PyDict_Check(object) && Py_TYPE(object)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
}

// The value of a key, or null. May run code of the user's, if a key of the user's has the hash of ours.
inline py::object item_of(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw python_error();
  return py::reinterpret_borrow<py::object>(value);
}

// Whether looking a name up in a dict runs no code of the user's.
inline bool has_plain_keys(PyObject* dict) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);)
    if (!PyUnicode_CheckExact(key)) return false;
  return true;
}

// Keys that were loaded from a file are other objects than ours.
inline bool same_key(PyObject* a, PyObject* b) {
  return a == b || (PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0);
}

// Looks keys up in a dict. Asked in the order in which they stand there, which is the usual case, it takes no search. A search may run
// code of the user's, if keys of the user's have the hash of ours.
class Reader {
 public:
  explicit Reader(PyObject* dict) : dict(dict) {}
  PyObject* operator()(PyObject* wanted) { return is_next(wanted) ? value : found(PyDict_GetItemWithError(dict, wanted)); }
  // An object as the key whose hash is known and need not be computed; unless `trusted`, it may have another one.
  PyObject* operator()(PyObject* wanted, Py_hash_t hash, bool trusted) {
    if (is_next(wanted)) return value;
    PyObject* entry = found(_PyDict_GetItem_KnownHash(dict, wanted, hash));
    return entry || trusted ? entry : found(PyDict_GetItemWithError(dict, wanted));
  }

 private:
  bool is_next(PyObject* wanted) {
    Py_ssize_t at = next;
    if (!PyDict_Next(dict, &at, &key, &value) || !same_key(key, wanted)) return false;
    next = at;
    return true;
  }
  static PyObject* found(PyObject* entry) {
    if (!entry && PyErr_Occurred()) throw python_error();
    return entry;
  }
  PyObject *dict, *key = nullptr, *value = nullptr;
  Py_ssize_t next = 0;
};

}  // namespace fastopt
