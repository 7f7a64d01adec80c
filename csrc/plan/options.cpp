// Reading the numbers of a param group, and computing the scalars of a step from them.
#include "plan/options.h"

#include <new>

namespace fastopt {
namespace {

template <class A, class T, class N> void construct(const N* numbers, double t, AnyScalars& out) {
  static_assert(sizeof(typename A::template Scalars<T>) <= sizeof(AnyScalars));
  new (&out) typename A::template Scalars<T>(*reinterpret_cast<const typename A::template Hyper<N>*>(numbers), t);
}

template <class A> Algorithm describe() {
  static_assert(sizeof(A::keys) / sizeof(Key) <= max_keys && sizeof(A::slots) / sizeof(char*) <= max_slots);
  static_assert(sizeof(typename A::template Hyper<double>) / sizeof(double) <= max_numbers);
  Algorithm made = {A::name, A::has_step, sizeof(A::keys) / sizeof(Key), sizeof(A::slots) / sizeof(char*),
                    sizeof(typename A::template Hyper<double>) / sizeof(double), sizeof(typename A::template Scalars<double>) / sizeof(double),
                    A::keys, A::slots,
                    [](const double* n) { return A::used(*reinterpret_cast<const typename A::template Hyper<double>*>(n)); },
                    [](const double* n, double t, bool f64, AnyScalars& out) { f64 ? construct<A, double>(n, t, out) : construct<A, float>(n, t, out); },
                    [](const Value* n, double t, bool f64, AnyScalars& out) { f64 ? construct<A, double>(n, t, out) : construct<A, float>(n, t, out); },
                    {}, {}};
  for (int k = 0; k < made.keys; k++) made.key_names[k] = interned(A::keys[k].name);
  for (int k = 0; k < made.slots; k++) made.slot_keys[k] = interned(A::slots[k]);
  return made;
}
template <class... A> std::array<Algorithm, sizeof...(A)> describe_all(std::tuple<A...>*) { return {describe<A>()...}; }

// The address of a number on the GPU as kernels/multi_tensor.py wants it: 1 is added for fp32.
int64_t device_number(const TensorImpl* t) {
  DType dtype;
  if (!dtype_of(t, dtype) || (dtype != DType::f32 && dtype != DType::f64)) throw Outside{"a hyper-parameter on a GPU is neither float32 nor float64"};
  return reinterpret_cast<int64_t>(address_of(t, itemsize(dtype), false)) + (dtype == DType::f32);
}

// What Python's `one, other = pair` gives: of a tuple, a list of a configuration file, an array, a tensor of two numbers.
std::array<py::object, 2> two_of(const py::object& pair, const char* key, size_t at) {
  if (PyTuple_CheckExact(pair.ptr()) && PyTuple_GET_SIZE(pair.ptr()) == 2)
    return {py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(pair.ptr(), 0)), py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(pair.ptr(), 1))};
  auto shown = [&] { return py::cast<std::string>(py::repr(pair)); };
  const auto iterator = py::reinterpret_steal<py::object>(PyObject_GetIter(pair.ptr()));
  if (!iterator) PyErr_Clear(), raise(PyExc_TypeError, c10::str(key, " of param group ", at, " must be two numbers, not ", shown()));
  std::array<py::object, 3> found;                   // the third should not be there
  for (py::object& one : found)
    if (!(one = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr())))) break;
  if (PyErr_Occurred()) throw python_error();
  if (!found[1] || found[2]) raise(PyExc_ValueError, c10::str(key, " of param group ", at, " must be two numbers, not ", shown()));
  return {found[0], found[1]};
}

}  // namespace

const std::array<Algorithm, algorithm_count>& algorithms() {
  static const auto all = describe_all(static_cast<Algorithms*>(nullptr));
  return all;
}

// A tensor makes all of a group's numbers Values, whose arithmetic is torch's; but of a tensor on the GPU in a capturable group, only the
// address is taken.
void Options::read(PyObject* dict, size_t at, Group& group, Hypers& hypers, Numbers& own) {
  const py::object is_capturable = item_of(dict, names::capturable);
  group = {}, hypers = {}, own = {};
  group.device = -1, group.capturable = is_capturable && is_true(is_capturable.ptr());
  Value read[max_numbers];
  int n = 0;
  bool on_host = false;
  auto take = [&](PyObject* item, const char* key) {
    if (PyFloat_Check(item)) {
      hypers.numbers[n] = PyFloat_AS_DOUBLE(item);
    } else if (!PyLong_CheckExact(item) && THPVariable_Check(item)) {   // isinstance(1, torch.Tensor) is a call into Python
      const at::Tensor& tensor = THPVariable_Unpack(item);
      if (tensor.key_set().has(c10::DispatchKey::Python) || (!is_exact(item) && has_torch_function(item))) throw Outside{"a hyper-parameter is a tensor subclass"};
      if (tensor.numel() != 1) raise(PyExc_ValueError, c10::str("Tensor ", key, " of param group ", at, " must be 1-element, not of shape ", tensor.sizes()));
      group.tensors = true;
      if (group.capturable && tensor.device().type() == gpu_type) {
        hypers.addresses[n] = device_number(tensor.unsafeGetTensorImpl());
        const c10::DeviceIndex device = index_of(tensor.device());
        if (group.device >= 0 && group.device != device) throw Outside{"hyper-parameters of a param group are on several GPUs"};
        group.device = device;
      } else {
        read[n] = Value(tensor.detach().cpu().squeeze());
        hypers.numbers[n] = double(read[n]);
        on_host = true;
      }
    } else {
      hypers.numbers[n] = PyFloat_AsDouble(item);
      if (hypers.numbers[n] == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        raise(PyExc_TypeError, c10::str(key, " of param group ", at, " must be a number, not ", Py_TYPE(item)->tp_name));
      }
    }
    if (!read[n].tensor.defined()) read[n].number = hypers.numbers[n];
    n++;
  };
  for (int k = 0; k < algorithm.keys; k++) {
    const py::object item = item_of(dict, algorithm.key_names[k]);
    const auto [key, kind] = algorithm.key[k];
    if (!item) raise(PyExc_KeyError, c10::str(key, ": missing in param group ", at));
    if (kind == truth) {
      read[n] = hypers.numbers[n] = is_true(item.ptr());
      n++;
    } else if (kind == number) {
      take(item.ptr(), key);
    } else {
      for (const py::object& one : two_of(item, key, at)) take(one.ptr(), key);
    }
  }
  group.used = algorithm.used(hypers.numbers);
  for (int i = 0; i < n; i++)
    if (hypers.addresses[i]) {                       // the number is not known here: it must not decide on the state
      double other[max_numbers];
      std::copy_n(hypers.numbers, max_numbers, other);
      other[i] = 1;
      if (algorithm.used(other) != group.used) throw Outside{"a hyper-parameter on a GPU decides on the state"};
    }
  own.at = at;
  own.last_t[0] = own.last_t[1] = std::nan("");      // equal to no count
  own.values = -1;
  if (on_host) {
    own.values = int64_t(values.size());
    for (int i = 0; i < n; i++) values.push_back(read[i]);
  }
}

size_t Options::add(PyObject* dict, size_t at) {
  Group group;
  Hypers hypers;
  Numbers own;
  read(dict, at, group, hypers, own);
  groups.push_back(group), hypers_.push_back(hypers), numbers.push_back(own);
  return groups.size() - 1;
}

bool Options::read_again(size_t place, PyObject* dict) {
  const Group before = groups[place];
  read(dict, numbers[place].at, groups[place], hypers_[place], numbers[place]);
  const Group& now = groups[place];
  return now.used == before.used && now.device == before.device && now.capturable == before.capturable;
}

bool Options::is_simple(PyObject* dict) const {
  if (!has_plain_keys(dict)) return false;
  auto is_number = [](PyObject* item) { return PyFloat_CheckExact(item) || PyLong_CheckExact(item) || PyBool_Check(item) || item == Py_None; };
  for (int k = 0; k < algorithm.keys; k++) {
    PyObject* item = PyDict_GetItemWithError(dict, algorithm.key_names[k]);
    if (!item) return false;
    auto is_simple_one = [&](PyObject* one) { return is_number(one) || (algorithm.key[k].kind != truth && (PyFloat_Check(one) || is_exact(one))); };
    const bool is_pair = algorithm.key[k].kind == pair && PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == 2;
    if (!(is_pair ? is_simple_one(PyTuple_GET_ITEM(item, 0)) && is_simple_one(PyTuple_GET_ITEM(item, 1)) : is_simple_one(item))) return false;
  }
  for (PyObject* name : {names::capturable, names::differentiable}) {
    PyObject* item = PyDict_GetItemWithError(dict, name);
    if (item && item != Py_False && (name == names::differentiable || item != Py_True)) return false;
  }
  return true;
}

size_t Options::scalars_for(size_t group, double t, bool f64) {
  Numbers& own = numbers[group];
  if (own.last_t[f64] == t) return own.last[f64];
  scalars_of.push_back({group, f64, t});
  compute(scalars_of.back(), scalars_.emplace_back());
  own.last_t[f64] = t;
  return own.last[f64] = scalars_.size() - 1;
}

void Options::advance() {
  for (size_t i = 0; i < scalars_.size(); i++) {
    scalars_of[i].t = algorithm.has_step ? scalars_of[i].t + 1 : 2;
    compute(scalars_of[i], scalars_[i]);
  }
}

void Options::compute(const ScalarsOf& of, AnyScalars& out) {
  const Numbers& own = numbers[of.group];
  const double* given = hypers_[of.group].numbers;
  if (own.values < 0) algorithm.compute(given, of.t, of.f64, out);
  else algorithm.compute_from_tensors(&values[size_t(own.values)], of.t, of.f64, out);
  bool finite = true, given_finite = own.values < 0 && std::isfinite(of.t);
  for (int i = 0; i < algorithm.numbers; i++) given_finite = given_finite && std::isfinite(given[i]);
  for (int i = 0; i < algorithm.scalars; i++)
    finite = finite && std::isfinite(of.f64 ? reinterpret_cast<double*>(&out)[i] : double(reinterpret_cast<float*>(&out)[i]));
  if (given_finite && !finite)
    raise(PyExc_ZeroDivisionError, c10::str("the hyper-parameters of param group ", own.at, " give an infinite or undefined factor at step ", of.t,
                                            ": check them (a beta of 1 or more, an overflow of the dtype) and state['step']"));
}

}  // namespace fastopt
