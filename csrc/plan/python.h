// Python objects, dicts above all: errors, attributes, look-ups without a search, and whether a dict is as it was.
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
                *const plan = interned("_plan"), *const update = interned("_update"), *const grad = interned("grad"),
                *const torch_function = interned("__torch_function__"), *const mesh = interned("mesh"), *const placements = interned("placements");
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

// Keys that were loaded from a file are other objects than ours.
inline bool same_key(PyObject* a, PyObject* b) {
  return a == b || (PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0);
}

// Where in a dict a key stands, so that the next step need not search for it. Asking a wrong place is harmless.
using Place = Py_ssize_t;

inline PyObject* value_at(PyObject* dict, Place place, PyObject* wanted) {
  PyObject *key, *value;
  return PyDict_Next(dict, &place, &key, &value) && same_key(key, wanted) ? value : nullptr;
}

// A number that no other dict has or had and that changes when the dict does, so that nothing in it need be compared; 0 from Python 3.14
// on, which has none.
#if PY_VERSION_HEX < 0x030E0000 && !defined(FASTOPT_NO_DICT_VERSIONS)
constexpr bool dicts_have_versions = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
inline uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#pragma GCC diagnostic pop
#else
constexpr bool dicts_have_versions = false;
inline uint64_t version_of(PyObject*) { return 0; }
#endif
inline bool has_version(PyObject* dict, uint64_t version) { return dicts_have_versions && version_of(dict) == version; }

// Looks keys up in a dict, and tells their places. Asked in the order in which they stand there, which is the usual case, it takes no
// search. A search may run code of the user's, if keys of the user's have the hash of ours.
class Reader {
 public:
  explicit Reader(PyObject* dict) : dict(dict) {}
  PyObject* operator()(PyObject* wanted) { return is_next(wanted) ? value : found(PyDict_GetItemWithError(dict, wanted), wanted); }
  // An object as the key whose hash is known and need not be computed; unless `trusted`, it may have another one.
  PyObject* operator()(PyObject* wanted, Py_hash_t hash, bool trusted) {
    if (is_next(wanted)) return value;
    PyObject* entry = _PyDict_GetItem_KnownHash(dict, wanted, hash);
    if (!entry && !trusted && !PyErr_Occurred()) entry = PyDict_GetItemWithError(dict, wanted);
    return found(entry, wanted);
  }
  // Of what was read last.
  Place place() const { return here; }

 private:
  bool is_next(PyObject* wanted) {
    Place at = next;
    if (!PyDict_Next(dict, &at, &key, &value) || !same_key(key, wanted)) return false;
    here = next, next = at;
    return true;
  }
  PyObject* found(PyObject* entry, PyObject* wanted) {
    if (!entry && PyErr_Occurred()) throw python_error();
    if (!dicts_have_versions && entry) find_place(wanted);
    return entry;
  }
  // From here on to the end, and then from the beginning: after one key that is out of order, the next ones follow it as a rule.
  void find_place(PyObject* wanted) {
    for (Place from : {next, Place(0)}) {
      Place at = here = from;
      while (PyDict_Next(dict, &at, &key, &value)) {
        if (same_key(key, wanted)) return void(next = at);
        here = at;
      }
    }
  }
  PyObject *dict, *key = nullptr, *value = nullptr;
  Place next = 0, here = 0;
};

}  // namespace fastopt
