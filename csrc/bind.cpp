// The plan, and the only file that knows torch: walks an optimizer's live containers, checks everything, then writes.
//
//   step(optimizer)  ->  None                      the step is done
//                        ((bucket, ...), ...)      done on the CPU; fastopt/gpu.py uploads and launches these
//                        ("gpu", want, ...)        kernels or buffers are wanted (nothing was written; set_buffer, call again)
//                        [(group, param), ...]     these parameters want their state made (nothing was written; call again)
//                        "reason"                  not for this library: torch's own step shall run (nothing was written)
//                        raises                    refused (nothing was written)
//
// step(optimizer, fresh)  the same, after state was made for the parameters in the list `fresh`, which is emptied before it writes
//
// A step follows no address that it did not read or verify itself, so nothing can be stale. What a plan keeps of the step before is there
// to be compared: where every object, dtype, device and number of elements is what `check` saw, with gradient and state laid out as the
// parameter, its conclusions hold and `recheck` is enough. A param group that changed is read again; at any other difference `check` does
// it all again.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/rsub.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COWDeleter.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

#include "core.h"
#include "optimizers.h"

namespace fastopt {
namespace {

// ---- counted: tests assert that a hot step allocates nothing, and that a step like the one before is only compared with it

int64_t allocations = 0, checks = 0;

template <class T> struct Counted {
  using value_type = T;
  Counted() = default;
  template <class U> Counted(const Counted<U>&) {}
  T* allocate(size_t n) { allocations++; return std::allocator<T>().allocate(n); }
  void deallocate(T* p, size_t n) { std::allocator<T>().deallocate(p, n); }
  template <class U> bool operator==(const Counted<U>&) const { return true; }
  template <class U> bool operator!=(const Counted<U>&) const { return false; }
};
template <class T> using Vec = std::vector<T, Counted<T>>;

const Isa* isa = best_isa();

// ---- hyper-parameters that are tensors: the scalars of a step are then computed with torch's own operations on 0-dim tensors

struct Value {
  double number = 0;
  at::Tensor tensor;                                         // undefined: the value is number
  Value() = default;
  Value(double n) : number(n) {}
  Value(at::Tensor t) : tensor(std::move(t)) {}
  explicit operator double() const { return tensor.defined() ? tensor.item<double>() : number; }
};
Value operator-(const Value& a) { return a.tensor.defined() ? Value(a.tensor.neg()) : Value(-a.number); }
Value operator+(double a, const Value& b) { return b.tensor.defined() ? Value(b.tensor + a) : Value(a + b.number); }
Value operator-(double a, const Value& b) { return b.tensor.defined() ? Value(at::rsub(b.tensor, a)) : Value(a - b.number); }
Value operator*(const Value& a, const Value& b) {
  if (!a.tensor.defined() && !b.tensor.defined()) return a.number * b.number;
  if (!a.tensor.defined()) return b.tensor * a.number;
  return b.tensor.defined() ? a.tensor * b.tensor : a.tensor * b.number;
}
Value operator/(const Value& a, const Value& b) {
  if (!a.tensor.defined() && !b.tensor.defined()) return a.number / b.number;
  if (!a.tensor.defined()) return b.tensor.reciprocal() * a.number;   // what torch.Tensor.__rtruediv__ does
  return b.tensor.defined() ? a.tensor / b.tensor : a.tensor / b.number;
}
Value pow(const Value& a, double b) { return a.tensor.defined() ? Value(a.tensor.pow(b)) : Value(std::pow(a.number, b)); }
template <class T> Value to(const Value& value) {
  return value.tensor.defined() ? Value(value.tensor.to(c10::CppTypeToScalarType<T>::value)) : value;
}

// ---- what the machinery needs to know of an optimizer

constexpr int max_keys = 8, max_numbers = 8;

struct alignas(16) Scalars { char bytes[max_scalars * sizeof(double)]; };

struct Optimizer {
  const char* name;
  bool has_step;
  int keys, slots, numbers, scalars;
  const Key* key;
  const char* const* slot_names;
  unsigned (*used)(const double* numbers);
  void (*compute)(const double* numbers, double t, bool f64, Scalars& out);
  void (*compute_from_tensors)(const Value* values, double t, bool f64, Scalars& out);
};

template <class O, class T, class N> void put(const N* numbers, double t, Scalars& out) {
  static_assert(sizeof(typename O::template Scalars<T>) <= sizeof(Scalars));
  new (&out) typename O::template Scalars<T>(*reinterpret_cast<const typename O::template Hyper<N>*>(numbers), t);
}
template <class O> constexpr Optimizer describe() {
  static_assert(sizeof(O::keys) / sizeof(Key) <= max_keys && sizeof(O::slots) / sizeof(char*) <= max_slots);
  static_assert(sizeof(typename O::template Hyper<double>) / sizeof(double) <= max_numbers);
  return {O::name, O::has_step, sizeof(O::keys) / sizeof(Key), sizeof(O::slots) / sizeof(char*),
          sizeof(typename O::template Hyper<double>) / sizeof(double), sizeof(typename O::template Scalars<double>) / sizeof(double),
          O::keys, O::slots,
          [](const double* n) { return O::used(*reinterpret_cast<const typename O::template Hyper<double>*>(n)); },
          [](const double* n, double t, bool f64, Scalars& out) { f64 ? put<O, double>(n, t, out) : put<O, float>(n, t, out); },
          [](const Value* n, double t, bool f64, Scalars& out) { f64 ? put<O, double>(n, t, out) : put<O, float>(n, t, out); }};
}
template <class... O> constexpr std::array<Optimizer, sizeof...(O)> describe_all(std::tuple<O...>*) { return {describe<O>()...}; }
const auto optimizers = describe_all(static_cast<Optimizers*>(nullptr));

// ---- names, interned once

struct Names {
  PyObject *param_groups, *state, *params, *differentiable, *capturable, *step, *plan, *local_tensor, *spec, *mesh, *placements;
  PyObject *keys[optimizers.size()][max_keys], *slots[optimizers.size()][max_slots];
  PyObject *torch_function, *disabled_torch_function, *grad, *tensor_grad, *keys_of_mapping;
  Names() {
    auto intern = [](const char* s) { return PyUnicode_InternFromString(s); };
    param_groups = intern("param_groups"), state = intern("state"), params = intern("params"), step = intern("step");
    differentiable = intern("differentiable"), capturable = intern("capturable"), plan = intern("_fastopt_plan");
    local_tensor = intern("_local_tensor"), spec = intern("_spec"), mesh = intern("mesh"), placements = intern("placements");
    for (size_t o = 0; o < optimizers.size(); o++) {
      for (int k = 0; k < optimizers[o].keys; k++) keys[o][k] = intern(optimizers[o].key[k].name);
      for (int k = 0; k < optimizers[o].slots; k++) slots[o][k] = intern(optimizers[o].slot_names[k]);
    }
    torch_function = intern("__torch_function__"), grad = intern("grad"), keys_of_mapping = intern("keys");
    tensor_grad = py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
    disabled_torch_function = py::object(py::module_::import("torch._C").attr("_disabled_torch_function_impl")).release().ptr();
  }
};
const Names* names;

// ---- what is a tensor to us

struct Outside { const char* reason; };   // thrown: torch's own step shall run

const uint64_t plain_keys = (c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
                             c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
                             c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
                             c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) |
                             c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA)).raw_repr();

// The device type that Triton serves: CUDA, which ROCm goes by too. Tests without a GPU let it serve CPU tensors.
c10::DeviceType gpu_type = c10::kCUDA;

// A dense CPU or GPU tensor with nothing between it and its memory: no subclass, no lazy negation or conjugation, no transform.
bool is_plain(const at::TensorImpl* t) { return (t->key_set().raw_repr() & ~plain_keys) == 0; }

bool is_exact(PyObject* object) { return THPVariable_CheckTypeExact(Py_TYPE(object)); }   // a torch.Tensor or Parameter, of no subclass

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) throw python_error();
  return py::reinterpret_steal<py::object>(value);
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw python_error();
  return truth;
}

// Whether a subclass has a say in what is done with its tensors; or in what their gradient is.
bool has_torch_function(PyObject* tensor) {
  return attribute(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), names->torch_function).ptr() != names->disabled_torch_function;
}
bool has_own_grad(PyObject* tensor) {
  return attribute(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), names->grad).ptr() != names->tensor_grad;
}

// A DTensor; its class is looked for only once torch.distributed.tensor is imported, which costs too much to do it here.
bool is_dtensor(PyObject* object) {
  static PyObject* type = nullptr;
  if (!type) {
    PyObject* name = PyUnicode_InternFromString("torch.distributed.tensor");
    auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
    Py_DECREF(name);
    if (!module) return PyErr_Clear(), false;
    type = py::object(module.attr("DTensor")).release().ptr();
  }
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

// The local tensor of a DTensor, and its placement.
struct Local {
  at::TensorImpl* impl;
  py::object spec;
};
Local local_of(PyObject* dtensor) {
  const py::object local = attribute(dtensor, names->local_tensor);   // the DTensor holds it
  return {THPVariable_Unpack(local.ptr()).unsafeGetTensorImpl(), attribute(dtensor, names->spec)};
}
bool same_placement(const py::object& a, const py::object& b) {
  if (a.ptr() == b.ptr()) return true;
  for (PyObject* name : {names->mesh, names->placements}) {
    const int equal = PyObject_RichCompareBool(attribute(a.ptr(), name).ptr(), attribute(b.ptr(), name).ptr(), Py_EQ);
    if (equal < 0) throw python_error();
    if (!equal) return false;
  }
  return true;
}

C10_ALWAYS_INLINE bool same_sizes(const at::TensorImpl* a, const at::TensorImpl* b) {
  const at::IntArrayRef x = a->sizes(), y = b->sizes();
  bool same = x.size() == y.size();
  for (size_t d = 0; same && d < x.size(); d++) same = x[d] == y[d];
  return same;
}

// Whether a tensor is like `param` in dtype, layout and, but for the GPU's number, device; and no subclass if that is none. Almost every
// gradient and state tensor is; then it needs few of the checks that the parameter passed.
class Alike {
 public:
  C10_ALWAYS_INLINE explicit Alike(const at::TensorImpl* param)
      : keys(param->key_set()), dtype(param->dtype()), sizes(param->sizes()), strides(param->strides()) {}
  C10_ALWAYS_INLINE bool operator()(const at::TensorImpl* t) const {
    if (t->key_set() != keys || t->dtype() != dtype) return false;
    const at::IntArrayRef own = t->sizes(), own_strides = t->strides();
    if (own.size() != sizes.size()) return false;
    for (size_t d = 0; d < own.size(); d++)
      if (own[d] != sizes[d] || (own_strides[d] != strides[d] && own[d] > 1)) return false;
    return true;
  }

 private:
  const c10::DispatchKeySet keys;
  const caffe2::TypeMeta dtype;
  const at::IntArrayRef sizes, strides;
};

C10_ALWAYS_INLINE bool dtype_of(const at::TensorImpl* t, DType& out) {
  switch (t->dtype().toScalarType()) {
    case at::kFloat: out = DType::f32; return true;
    case at::kDouble: out = DType::f64; return true;
    case at::kBFloat16: out = DType::bf16; return true;
    case at::kHalf: out = DType::f16; return true;
    default: return false;
  }
}

// Whether looking a key up in the object is looking it up in the dict that it is.
bool is_dict(PyObject* object) {
  return PyDict_Check(object) && Py_TYPE(object)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
}

// A number that no other dict has or had and that changes when the dict does, so that what it holds need not be looked up again; 0 from
// Python 3.14 on, which has none.
C10_ALWAYS_INLINE uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// Looks keys up in a dict. Asked in the order in which they stand there, which is the usual case, it takes no search.
class Reader {
 public:
  explicit Reader(PyObject* dict) : dict(dict) {}
  PyObject* operator()(PyObject* wanted) { return has_next(wanted) ? value : found(PyDict_GetItemWithError(dict, wanted)); }
  // A tensor as the key. Tensor.__hash__ is Python and too slow to call, but known: it is the address. Of a subclass it may differ.
  PyObject* of_tensor(PyObject* wanted) {
    if (has_next(wanted)) return value;
    PyObject* entry = found(_PyDict_GetItem_KnownHash(dict, wanted, reinterpret_cast<Py_hash_t>(wanted)));
    return entry || is_exact(wanted) ? entry : found(PyDict_GetItemWithError(dict, wanted));
  }

 private:
  bool has_next(PyObject* wanted) {
    Py_ssize_t next = at;
    if (!PyDict_Next(dict, &next, &key, &value) || key != wanted) return false;
    at = next;
    return true;
  }
  static PyObject* found(PyObject* entry) {
    if (!entry && PyErr_Occurred()) throw python_error();
    return entry;
  }
  PyObject *dict, *key = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
};

// ---- the plan

struct Where { size_t group, param; };
std::ostream& operator<<(std::ostream& out, Where w) { return out << "parameter " << w.param << " of param group " << w.group; }

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw python_error();
}

class Plan {
 public:
  explicit Plan(int index) : index(index), optimizer(optimizers[index]) {}
  PyObject* step(PyObject* self, PyObject* fresh);
  void set_buffer(size_t bucket, int64_t words, int64_t address);
  void take_back(size_t bucket);

 private:
  struct Group {                                  // what the options of a param group say
    double numbers[max_numbers];
    int64_t values;                               // place in `values`, if some hyper-parameter is a tensor; else -1
    int64_t addresses[max_numbers];               // of a capturable group's numbers that are tensors on a GPU; else 0
    c10::DeviceIndex device;                      // where these are; else -1
    unsigned used;
    size_t at;                                    // place in param_groups
    double last_t[2];                             // the step counts whose scalars were wanted last, for fp32 and fp64,
    size_t last[2];                               // and their place in `scalars`
  };
  struct ScalarsOf { uint32_t group; bool f64; double t; };
  struct Written {                                // what a row writes besides its elements, and how it came about
    at::TensorImpl *param, *grad, *slots[max_slots], *step;
    void* count;                                  // the step count in memory, a double or a float
    bool count_f64;
    double t;                                     // what it shall be
    uint32_t group;
    size_t scalars;
    int64_t layout;
    size_t bucket;                                // of a GPU row
    bool moved;                                   // whether an address is another than at the step before
    int64_t table_at;                             // of a GPU row: its place in the image
    int64_t count_address;                        // of the step count on the GPU, for a capturable row
  };
  struct Batch {
    Vec<Row> rows;
    Vec<Written> written;                         // row by row
    void clear() { rows.clear(), written.clear(); }
  };
  struct Bucket {                                 // GPU rows that one launch serves
    c10::DeviceIndex device;
    unsigned used;
    DType param, state;
    bool capturable;
    int64_t capacity = 0, base = 0;               // of its buffer on the device: words of 8 bytes that it holds, its address
    Vec<int64_t> image;                           // the arrays of kernels/multi_tensor.py, as last handed over
    Vec<int64_t> numels;                          // of the rows in it
    Vec<size_t> scalars;                          // place in the plan's `scalars` of each row of scalars
    bool current = false;                         // whether image has the present shapes
    int64_t programs = 0, words = 0, table_at = 0, hypers_at = 0, numbers_at = 0, scalars_at = 0, changed_from = 0, changed_to = 0;
    int64_t rows = 0, scalar_rows = 0, last_scalars = -1;
    int64_t groups = 0, last_group = -1;          // of capturable rows
  };
  struct Extent { uintptr_t begin, end; bool written; };   // of a parameter or gradient in memory

  // What `check` saw, in the order of its walk. No address in it is followed before it was compared.
  struct SeenGroup {
    PyObject *dict, *params;
    uint64_t version;                             // of dict
    Py_ssize_t count;                             // of params
    size_t first;                                 // place of the first in `seen_params`
    int64_t group;                                // place in `groups`; -1 if no parameter has a gradient
    bool capturable;
    const char* outside;                          // why its numbers could not be read here, or null
  };
  struct SeenParam {
    PyObject *object, *entry, *slots[max_slots], *step;
    uint64_t entry_version;
    PyTypeObject* type;
    c10::DispatchKeySet keys, step_keys;
    caffe2::TypeMeta dtype, step_dtype;
    c10::Device device = at::kCPU;
    bool has_grad, on_gpu;
    size_t row, extents;                          // places in the batch of its device and in `extents`
  };

  void ask_class(PyObject* self);
  void check(PyObject* self, PyObject* fresh);
  bool recheck(PyObject* self);
  void fetch(const SeenParam& seen) const;
  bool recheck_group(PyObject* dict, SeenGroup& seen, size_t at);
  bool recheck_params(size_t begin, size_t end);
  template <class F> void share_params(size_t count, F f) const;
  bool recheck_param(PyObject* object, const SeenParam& seen);
  Group read_group(PyObject* dict, size_t at, bool capturable);
  void check_group(PyObject* dict, size_t at);
  void check_param(PyObject* object, PyObject* group_dict, Where where, Reader& state);
  at::TensorImpl* check_slot(PyObject* value, const at::TensorImpl* param, DType param_dtype, const py::object& placement,
                             const char* name, Where where, DType& dtype);
  void add_missing(PyObject* group_dict, PyObject* param);
  int64_t layout_of(at::TensorImpl* const* operands);
  size_t scalars_for(uint32_t group_at, double t, bool f64);
  void compute_scalars(const ScalarsOf& of, Scalars& out);
  static Extent extent_of(const at::TensorImpl* t, const void* data, int64_t itemsize, bool dense, bool written);
  bool rows_overlap();
  void count_repeated_steps();
  void count_steps(Batch& batch, bool as_before);
  void lay_out(bool in_turn);
  void write(bool in_turn);
  size_t bucket_of(const Row& row, c10::DeviceIndex device, bool capturable);
  bool images_fit() const;
  PyObject* gpu_wants();
  void fill_images();
  void refresh_images();
  void put(Bucket& b, int64_t at, int64_t word);
  void put_addresses(Bucket& b, int64_t at, const Row& row);
  void put_scalars(Bucket& b, size_t row, size_t from);
  PyObject* gpu_launches();
  void run_rows(const Row* first, const int64_t* ends, size_t count);
  void clear();

  const int index;
  const Optimizer& optimizer;
  Vec<uint32_t> order;                            // of extents by address
  Vec<Bucket> buckets;
  bool busy = false;                              // a step is under way, perhaps without the GIL
  bool temporary = false;                         // gone after one step: nothing for the GPU may point into it
  PyTypeObject* type = nullptr;                   // of the optimizer, when its class was asked
  unsigned type_version = 0;                      // which changes when the class or a base of it does; 0 is none
  py::object torchs_step_because;                 // what it said: a str or None

  // What the last check concluded, in the order of its walk, and what it saw.
  bool comparable = false;                        // whether what it saw is all that its conclusions depend on
  bool kept = false;                              // whether it is there to be compared
  uint64_t state_version = 0;
  c10::DeviceType checked_gpu_type = c10::kCUDA;
  Vec<SeenGroup> seen_groups;
  Vec<SeenParam> seen_params;
  Vec<Group> groups;
  Batch cpu, gpu;
  Vec<Extent> extents;                            // of the parameter and of the gradient of each row
  Vec<int64_t> ends;
  Vec<Layout> layouts;
  Vec<int64_t> dims;
  int64_t work = 0;                               // of all CPU rows

  Vec<Scalars> scalars;
  Vec<ScalarsOf> scalars_of;                      // one for one
  std::atomic<bool> moved{false};                 // of a step like the one before: whether some row has

  // Memory used again; its content is that of one call.
  PyObject* missing = nullptr;                    // [(group, param), ...], or null
  std::vector<PyObject*> fresh_params;            // sorted; optimizers without step count need to know
  Vec<Value> values;
  Vec<c10::intrusive_ptr<at::TensorImpl>> alive;
};

void Plan::clear() {
  seen_groups.clear(), seen_params.clear(), groups.clear(), cpu.clear(), gpu.clear(), extents.clear(), ends.clear();
  layouts.clear(), dims.clear(), values.clear(), scalars.clear(), scalars_of.clear();
}

void Plan::add_missing(PyObject* group_dict, PyObject* param) {
  if (!missing) missing = PyList_New(0);
  PyObject* pair = missing ? PyTuple_Pack(2, group_dict, param) : nullptr;
  if (!pair || PyList_Append(missing, pair)) throw python_error();
  Py_DECREF(pair);
}

// The address of the first element, null if there is no memory. mutable_data() gives a lazily copied tensor memory of its own.
C10_ALWAYS_INLINE void* address_of(const at::TensorImpl* t, int64_t itemsize, bool written) {
  c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
  auto* base = static_cast<char*>(written ? storage->mutable_data() : const_cast<void*>(storage->data()));
  return base ? base + t->storage_offset() * itemsize : nullptr;
}

c10::DeviceIndex index_of(c10::Device gpu) { return gpu.has_index() ? gpu.index() : c10::DeviceIndex(0); }

// The address of a number on the GPU as kernels/multi_tensor.py wants it: 1 is added for fp32.
int64_t device_number(at::TensorImpl* t) {
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
  std::array<py::object, 3> found;                 // the third should not be there
  for (py::object& one : found)
    if (!(one = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr())))) break;
  if (PyErr_Occurred()) throw python_error();
  if (!found[1] || found[2]) raise(PyExc_ValueError, c10::str(key, " of param group ", at, " must be two numbers, not ", shown()));
  return {found[0], found[1]};
}

// The numbers behind the keys of a group. A tensor makes all of them Values, whose arithmetic is torch's; but of a tensor on the GPU in
// a capturable group, only the address is taken.
Plan::Group Plan::read_group(PyObject* dict, size_t at, bool capturable) {
  Group group = {};
  group.device = -1, group.at = at;
  Value read[max_numbers];
  int n = 0;
  bool tensors = false;
  auto put = [&](PyObject* item, const char* key) {
    if (PyFloat_Check(item)) {
      group.numbers[n] = PyFloat_AS_DOUBLE(item);
    } else if (!PyLong_CheckExact(item) && THPVariable_Check(item)) {   // isinstance(1, torch.Tensor) is a call into Python
      const at::Tensor& tensor = THPVariable_Unpack(item);
      if (!is_plain(tensor.unsafeGetTensorImpl()) && tensor.key_set().has(c10::DispatchKey::Python)) throw Outside{"a hyper-parameter is a tensor subclass"};
      if (tensor.numel() != 1) raise(PyExc_ValueError, c10::str("Tensor ", key, " of param group ", at, " must be 1-element, not of shape ", tensor.sizes()));
      if (capturable && tensor.device().type() == gpu_type) {
        group.addresses[n] = device_number(tensor.unsafeGetTensorImpl());
        const c10::DeviceIndex device = index_of(tensor.device());
        if (group.device >= 0 && group.device != device) throw Outside{"hyper-parameters of a param group are on several GPUs"};
        group.device = device;
      } else {
        read[n] = Value(tensor.detach().cpu().squeeze());
        group.numbers[n] = double(read[n]);
        tensors = true;
      }
    } else {
      group.numbers[n] = PyFloat_AsDouble(item);
      if (group.numbers[n] == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        raise(PyExc_TypeError, c10::str(key, " of param group ", at, " must be a number, not ", Py_TYPE(item)->tp_name));
      }
    }
    if (!read[n].tensor.defined()) read[n].number = group.numbers[n];
    n++;
  };
  for (int k = 0; k < optimizer.keys; k++) {
    // Held: reading it may run code of Python's, which may take it out of the group.
    const auto item = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict, names->keys[index][k]));
    const auto [key, kind] = optimizer.key[k];
    if (!item) raise(PyExc_KeyError, c10::str(key, ": missing in param group ", at));
    if (kind == truth) {
      read[n] = group.numbers[n] = is_true(item.ptr());
      n++;
    } else if (kind == number) {
      put(item.ptr(), key);
    } else {
      for (const py::object& one : two_of(item, key, at)) put(one.ptr(), key);
    }
  }
  group.used = optimizer.used(group.numbers);
  for (int i = 0; i < n; i++)
    if (group.addresses[i]) {                        // the number is not known here: it must not decide on the state
      double other[max_numbers];
      std::copy_n(group.numbers, max_numbers, other);
      other[i] = 1;
      if (optimizer.used(other) != group.used) throw Outside{"a hyper-parameter on a GPU decides on the state"};
    }
  group.last_t[0] = group.last_t[1] = std::nan("");  // equal to no count
  group.values = -1;
  if (tensors) {
    group.values = int64_t(values.size());
    for (int i = 0; i < n; i++) values.push_back(read[i]);
  }
  return group;
}

void Plan::compute_scalars(const ScalarsOf& of, Scalars& out) {
  const Group& group = groups[of.group];
  if (group.values < 0) optimizer.compute(group.numbers, of.t, of.f64, out);
  else optimizer.compute_from_tensors(&values[group.values], of.t, of.f64, out);
  bool finite = true, given_finite = group.values < 0 && std::isfinite(of.t);
  for (int i = 0; i < optimizer.numbers; i++) given_finite = given_finite && std::isfinite(group.numbers[i]);
  for (int i = 0; i < optimizer.scalars; i++)
    finite = finite && std::isfinite(of.f64 ? reinterpret_cast<double*>(&out)[i] : double(reinterpret_cast<float*>(&out)[i]));
  if (given_finite && !finite)
    raise(PyExc_ZeroDivisionError, c10::str("the hyper-parameters of param group ", group.at, " give an infinite or undefined factor at step ", of.t,
                                            ": check them (a beta of 1 or more, an overflow of the dtype) and state['step']"));
}

// The place in `scalars` of those of a group at a step count.
size_t Plan::scalars_for(uint32_t group_at, double t, bool f64) {
  Group& group = groups[group_at];
  if (group.last_t[f64] == t) return group.last[f64];
  scalars_of.push_back({group_at, f64, t});
  compute_scalars(scalars_of.back(), scalars.emplace_back());
  group.last_t[f64] = t;
  return group.last[f64] = scalars.size() - 1;
}

// A tensor that the step writes: torch's conditions for an in-place operation.
C10_NOINLINE void refuse_or_accept(at::TensorImpl* t, const char* name, Where where) {
  if (t->is_inference() && !c10::InferenceMode::is_enabled())
    raise(PyExc_RuntimeError, c10::str("Inplace update to inference tensor outside InferenceMode is not allowed: ", name, " of ", where,
                                       ". Make a clone outside of InferenceMode to get a normal tensor."));
  for (int64_t d = 0; d < t->dim(); d++)
    if (t->strides()[d] == 0 && t->sizes()[d] > 1)
      raise(PyExc_RuntimeError, c10::str("unsupported operation: more than one element of the written-to tensor refers to a single "
                                         "memory location (", name, " of ", where, "). Please clone() the tensor before performing the operation."));
}
C10_ALWAYS_INLINE void check_written(at::TensorImpl* t, const char* name, Where where) {
  if (!t->is_contiguous() || t->is_inference()) refuse_or_accept(t, name, where);
}

C10_ALWAYS_INLINE void* memory_of(const at::TensorImpl* t, int64_t itemsize, bool written, const char* name, Where where) {
  void* address = address_of(t, itemsize, written);
  if (!address && t->numel() > 0)
    raise(PyExc_RuntimeError, c10::str(name, " of ", where, " has ", t->numel(), " elements but no storage (was it freed or resized to 0?)"));
  return address;
}

// The same for any thread; null where it takes more: memory that is lazily copied and shall be written, is of another device, or missing.
C10_ALWAYS_INLINE void* memory_or_null(const at::TensorImpl* t, int64_t itemsize, bool written, c10::Device device) {
  const c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
  const bool lazily_copied = storage->data_ptr().get_deleter() == c10::impl::cow::cow_deleter;
  return storage->device() != device || (written && lazily_copied) ? nullptr : address_of(t, itemsize, written);
}

at::TensorImpl* Plan::check_slot(PyObject* value, const at::TensorImpl* param, DType param_dtype, const py::object& placement,
                                 const char* name, Where where, DType& dtype) {
  if (!THPVariable_Check(value))
    raise(PyExc_TypeError, c10::str("state['", name, "'] of ", where, " must be a tensor, not ", Py_TYPE(value)->tp_name));
  at::TensorImpl* t = THPVariable_Unpack(value).unsafeGetTensorImpl();
  if (placement) {
    if (!is_dtensor(value)) throw Outside{"state of a DTensor is none"};
    const Local local = local_of(value);
    if (!same_placement(placement, local.spec)) throw Outside{"a DTensor and its state are placed differently"};
    t = local.impl;
  }
  if (t->device() != param->device())
    raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " is on ", t->device(), ", the parameter on ", param->device()));
  if (!is_plain(t)) throw Outside{"a state tensor is not a plain strided tensor"};
  if (!same_sizes(t, param))
    raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " has shape ", t->sizes(), ", the parameter ", param->sizes(),
                                       ": move the state with the parameter, or delete its entry to start anew"));
  if (!dtype_of(t, dtype) || (dtype == DType::f64 && param_dtype != DType::f64))
    raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " has dtype ", c10::toString(t->dtype().toScalarType()),
                                       ", which the arithmetic for a ", c10::toString(param->dtype().toScalarType()), " parameter does not hold"));
  check_written(t, name, where);
  return t;
}

C10_NOINLINE void check_grad(const at::TensorImpl* grad, const at::TensorImpl* param, DType param_dtype, Where where) {
  DType dtype;
  if (grad->device() != param->device())
    raise(PyExc_RuntimeError, c10::str("grad of ", where, " is on ", grad->device(), ", the parameter on ", param->device()));
  if (!is_plain(grad)) throw Outside{"a gradient is sparse, a tensor subclass or not strided"};
  if (!dtype_of(grad, dtype) || dtype != param_dtype) throw Outside{"a gradient's dtype is not its parameter's"};
  if (!same_sizes(grad, param))
    raise(PyExc_RuntimeError, c10::str("grad of ", where, " has shape ", grad->sizes(), ", the parameter ", param->sizes()));
}

// An empty tensor has no memory; its own address tells whether it is there twice.
C10_ALWAYS_INLINE Plan::Extent Plan::extent_of(const at::TensorImpl* t, const void* data, int64_t itemsize, bool dense, bool written) {
  const auto begin = reinterpret_cast<uintptr_t>(data), own = reinterpret_cast<uintptr_t>(t);
  int64_t reach = t->numel();
  if (!reach) return {own, own + 1, written};
  if (!dense) {
    reach = 1;
    for (int64_t d = 0; d < t->dim(); d++) reach += (t->sizes()[d] - 1) * t->strides()[d];
  }
  return {begin, begin + uintptr_t(reach * itemsize), written};
}

void Plan::check_param(PyObject* object, PyObject* group_dict, Where where, Reader& state) {
  const bool exact = is_exact(object);
  if (!exact && !THPVariable_Check(object)) raise(PyExc_TypeError, c10::str("optimizer can only optimize Tensors, but ", where, " is ", Py_TYPE(object)->tp_name));
  const at::Tensor& grad_tensor = THPVariable_Unpack(object).unsafeGetTensorImpl()->grad();
  if (!exact && !is_dtensor(object) && has_own_grad(object)) throw Outside{"a parameter is of a class with a grad of its own"};
  comparable &= exact;
  SeenParam& seen = seen_params.emplace_back();
  seen.object = object, seen.type = Py_TYPE(object);
  if (!grad_tensor.defined()) return;
  at::TensorImpl *param = THPVariable_Unpack(object).unsafeGetTensorImpl(), *grad = grad_tensor.unsafeGetTensorImpl();
  py::object placement;                                              // null but for a DTensor
  if (!is_plain(param) && is_dtensor(object)) {
    const auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad_tensor));   // the parameter holds it
    Local local = local_of(object);
    const bool same = is_dtensor(wrapped.ptr()) && same_placement(local.spec, local_of(wrapped.ptr()).spec);
    if (!same) throw Outside{"a DTensor and its gradient are placed differently"};
    param = local.impl, grad = local_of(wrapped.ptr()).impl;
    placement = std::move(local.spec);
  }

  DType dtype;
  const bool capturable = seen_groups[where.group].capturable;
  const c10::Device device = param->device();
  const bool on_gpu = device.type() == gpu_type;
  if (!on_gpu && device.type() != at::kCPU) throw Outside{"a parameter is on a device other than CPU and GPU"};
  if (capturable && (!on_gpu || !optimizer.has_step)) throw Outside{"capturable=True"};
  if (!is_plain(param) || (!exact && !placement && has_torch_function(object))) throw Outside{"a parameter is a tensor subclass or not strided"};
  if (!dtype_of(param, dtype)) {
    auto other = param->dtype().toScalarType();
    if (c10::isComplexType(other)) throw Outside{"a parameter is complex"};
    if (c10::isFloatingType(other)) throw Outside{"a parameter is of an 8-bit dtype"};
    raise(PyExc_RuntimeError, c10::str(where, " has dtype ", c10::toString(other), ": only floating point and complex parameters can be stepped"));
  }
  check_written(param, "data", where);
  const Alike alike(param);
  auto is_alike = [&](const at::TensorImpl* t) { return alike(t) && (!on_gpu || t->device() == device); };
  bool all_alike = is_alike(grad);                // until one is found that is not
  if (!all_alike) check_grad(grad, param, dtype, where);

  if (const char* outside = seen_groups[where.group].outside) throw Outside{outside};
  if (seen_groups[where.group].group < 0) raise(PyExc_RuntimeError, "param_groups changed while its values were read");   // it had no gradient
  const auto group_at = uint32_t(seen_groups[where.group].group);
  const Group& group = groups[group_at];
  Batch& batch = on_gpu ? gpu : cpu;
  Row& row = batch.rows.emplace_back();           // if it stays unfinished, nothing will be written
  Written& w = batch.written.emplace_back();
  seen.has_grad = true, seen.keys = param->key_set(), seen.dtype = param->dtype(), seen.device = device, seen.on_gpu = on_gpu;
  seen.row = batch.rows.size() - 1, seen.extents = extents.size();
  row.optimizer = uint8_t(index), row.used = uint8_t(group.used), row.numel = param->numel();
  w.param = param, w.grad = grad, w.group = group_at;
  at::TensorImpl* operands[max_operands] = {param, grad};
  row.dtype[0] = row.dtype[1] = dtype;
  const int64_t size = itemsize(dtype);
  row.data[0] = memory_of(param, size, true, "data", where);
  row.data[1] = memory_of(grad, size, false, "grad", where);

  if (optimizer.has_step || group.used) {
    PyObject* entry = state.of_tensor(object);
    if (!entry || (is_dict(entry) && PyDict_GET_SIZE(entry) == 0)) return add_missing(group_dict, object);
    if (!is_dict(entry) && PyObject_HasAttr(entry, names->keys_of_mapping)) throw Outside{"state of a parameter is a mapping, but no dict"};
    if (!is_dict(entry)) raise(PyExc_TypeError, c10::str("state of ", where, " must be a dict, not ", Py_TYPE(entry)->tp_name));
    seen.entry = entry, seen.entry_version = version_of(entry);
    Reader read(entry);
    PyObject* step = seen.step = optimizer.has_step ? read(names->step) : nullptr;
    for (int k = 0; k < optimizer.slots; k++) {
      if (!(group.used >> k & 1)) continue;
      const char* name = optimizer.slot_names[k];
      PyObject* value = read(names->slots[index][k]);
      if (!optimizer.has_step && (!value || value == Py_None)) return add_missing(group_dict, object);
      if (!value) raise(PyExc_KeyError, c10::str("state['", name, "'] of ", where, " is missing: delete the entry to start anew, or load a complete state"));
      at::TensorImpl* slot = is_exact(value) ? THPVariable_Unpack(value).unsafeGetTensorImpl() : nullptr;
      row.dtype[2 + k] = dtype;
      int64_t slot_size = size;
      if (!slot || placement || !is_alike(slot)) {
        slot = check_slot(value, param, dtype, placement, name, where, row.dtype[2 + k]);
        slot_size = itemsize(row.dtype[2 + k]);
        all_alike = false;
      }
      seen.slots[k] = value;
      w.slots[k] = operands[2 + k] = slot;
      row.data[2 + k] = memory_of(slot, slot_size, true, name, where);
    }
    if (optimizer.has_step) {
      if (!step) raise(PyExc_KeyError, c10::str("state['step'] of ", where, " is missing: delete the entry to start anew, or load a complete state"));
      if (!is_exact(step) && !THPVariable_Check(step)) {
        if (!PyNumber_Check(step)) raise(PyExc_TypeError, c10::str("state['step'] of ", where, " must be a number, not ", Py_TYPE(step)->tp_name));
        return add_missing(group_dict, object);
      }
      w.step = THPVariable_Unpack(step).unsafeGetTensorImpl();
      DType count;
      if (w.step->numel() != 1) raise(PyExc_RuntimeError, c10::str("state['step'] of ", where, " must have one element, not shape ", w.step->sizes()));
      const bool is_number = is_plain(w.step) && dtype_of(w.step, count) && (count == DType::f32 || count == DType::f64);
      if (!is_number || (capturable ? w.step->device() != device : w.step->device_type() != at::kCPU)) return add_missing(group_dict, object);
      check_written(w.step, "state['step']", where);
      seen.step_keys = w.step->key_set(), seen.step_dtype = w.step->dtype();
      comparable &= is_exact(step) && !w.step->is_inference();
      void* memory = memory_of(w.step, itemsize(count), true, "state['step']", where);
      if (capturable) {
        w.count_address = reinterpret_cast<int64_t>(memory) + (count == DType::f32);
      } else {
        w.count = memory, w.count_f64 = count == DType::f64;
        w.t = w.count_f64 ? *static_cast<double*>(memory) + 1.0 : *static_cast<float*>(memory) + 1.0f;
      }
    }
  }
  if (!optimizer.has_step) w.t = std::binary_search(fresh_params.begin(), fresh_params.end(), object) ? 1 : 2;
  if (!capturable) w.scalars = scalars_for(w.group, w.t, dtype == DType::f64);
  const bool simple = all_alike && param->is_non_overlapping_and_dense();
  comparable &= simple && !param->is_inference();
  w.layout = simple ? -1 : layout_of(operands);
  w.moved = true;

  extents.push_back(extent_of(param, row.data[0], size, w.layout < 0, true));
  extents.push_back(extent_of(grad, row.data[1], size, w.layout < 0, false));
  if (on_gpu) {
    if (w.layout >= 0) throw Outside{"on a GPU, a parameter, its gradient and state differ in strides"};
    if (group.device >= 0 && group.device != index_of(device)) throw Outside{"a hyper-parameter is on another GPU than a parameter"};
    w.bucket = bucket_of(row, index_of(device), capturable);
  }
}

// The place in `layouts` of operands that do not walk memory in one order; -1 if they do. Dimensions are taken in the order of the
// parameter's strides and merged where all operands allow it.
int64_t Plan::layout_of(at::TensorImpl* const* operands) {
  const at::TensorImpl* param = operands[0];
  bool contiguous = true;
  for (int k = 0; k < max_operands; k++) contiguous &= !operands[k] || operands[k]->is_contiguous();
  if (contiguous || param->numel() == 0) return -1;
  bool same = param->is_non_overlapping_and_dense();
  for (int k = 1; k < max_operands; k++) same &= !operands[k] || operands[k]->strides() == param->strides();
  if (same) return -1;

  c10::SmallVector<int64_t, 16> by_stride;
  for (int64_t d = 0; d < param->dim(); d++)
    if (param->sizes()[d] > 1) by_stride.push_back(d);
  std::stable_sort(by_stride.begin(), by_stride.end(), [&](int64_t a, int64_t b) { return param->strides()[a] > param->strides()[b]; });
  auto stride = [&](int k, int64_t d) { return operands[k] ? operands[k]->strides()[d] : 0; };

  c10::SmallVector<std::array<int64_t, 1 + max_operands>, 16> merged;    // size, stride of each operand
  for (int64_t d : by_stride) {
    const int64_t size = param->sizes()[d];
    bool merge = !merged.empty();
    for (int k = 0; k < max_operands && merge; k++) merge = merged.back()[1 + k] == stride(k, d) * size;
    if (!merge) merged.push_back({1});
    merged.back()[0] *= size;
    for (int k = 0; k < max_operands; k++) merged.back()[1 + k] = stride(k, d);
  }
  if (merged.empty()) return -1;
  bool linear = merged.size() == 1;
  for (int k = 0; k < max_operands; k++) linear = linear && (!operands[k] || merged[0][1 + k] == 1);
  if (linear) return -1;
  layouts.push_back({int(merged.size()), nullptr, {}});
  for (int field = 0; field < 1 + max_operands; field++)
    for (const auto& dim : merged) dims.push_back(dim[field]);
  return int64_t(layouts.size()) - 1;
}

// Whether a param group is read without a call into Python, and its numbers can change only with its version.
bool is_simple_group(PyObject* dict, const Optimizer& optimizer, PyObject* const* keys) {
  auto is_simple = [](PyObject* item) { return PyFloat_Check(item) || PyLong_CheckExact(item) || PyBool_Check(item) || item == Py_None; };
  for (int k = 0; k < optimizer.keys; k++) {
    PyObject* item = PyDict_GetItemWithError(dict, keys[k]);
    if (!item) return false;
    const bool is_pair = optimizer.key[k].kind == pair && PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == 2;
    if (!(is_pair ? is_simple(PyTuple_GET_ITEM(item, 0)) && is_simple(PyTuple_GET_ITEM(item, 1)) : is_simple(item))) return false;
  }
  for (PyObject* name : {names->differentiable, names->capturable}) {
    PyObject* item = PyDict_GetItemWithError(dict, name);
    if (item && item != Py_False) return false;
  }
  return true;
}

void refuse_modes() {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) throw Outside{"a torch dispatch mode is active"};
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) throw Outside{"a torch.func transform is active"};
}

// A class that replaces a part of torch's step, or adds to it, is not for this library.
void Plan::ask_class(PyObject* self) {
  if (Py_TYPE(self) != type || type->tp_version_tag != type_version || !type_version) {
    torchs_step_because = py::handle(self).attr("_fastopt").attr("torchs_step_because")(py::handle(self));
    type = Py_TYPE(self), type_version = type->tp_version_tag;
  }
  if (torchs_step_because.is_none()) return;
  const char* reason = PyUnicode_AsUTF8(torchs_step_because.ptr());
  if (!reason) throw python_error();
  throw Outside{reason};
}

void Plan::check_group(PyObject* dict, size_t at) {
  const uint64_t version = is_dict(dict) ? version_of(dict) : 0;
  PyObject* params = is_dict(dict) ? PyDict_GetItemWithError(dict, names->params) : nullptr;
  if (!params || !PyList_Check(params)) throw Outside{"a param group is no dict or has no list of params"};
  const auto held = py::reinterpret_borrow<py::object>(params);
  auto is_set = [&](PyObject* name) {
    const auto flag = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict, name));
    return flag && is_true(flag.ptr());
  };
  if (is_set(names->differentiable)) throw Outside{"differentiable=True"};
  comparable = comparable && is_simple_group(dict, optimizer, names->keys[index]);
  SeenGroup seen = {dict, params, version, PyList_GET_SIZE(params), 0, -1, is_set(names->capturable), nullptr};
  bool has_grad = false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params) && !has_grad; i++) {
    PyObject* param = PyList_GET_ITEM(params, i);
    has_grad = (is_exact(param) || THPVariable_Check(param)) && THPVariable_Unpack(param).unsafeGetTensorImpl()->grad().defined();
  }
  if (has_grad) try {
    const Group group = read_group(dict, at, seen.capturable);
    seen.group = int64_t(groups.size());
    groups.push_back(group);
  } catch (const Outside& outside) {
    seen.outside = outside.reason;
  }
  seen_groups.push_back(seen);
}

void Plan::check(PyObject* self, PyObject* fresh) {
  checks++;
  clear();
  checked_gpu_type = gpu_type;
  comparable = PY_VERSION_HEX < 0x030E0000;          // with version_of
  refuse_modes();
  const py::object groups_object = attribute(self, names->param_groups), state_object = attribute(self, names->state);
  PyObject* param_groups = groups_object.ptr();
  if (!PyList_Check(param_groups) || !is_dict(state_object.ptr())) throw Outside{"param_groups is no list or state no dict"};
  state_version = version_of(state_object.ptr());    // first the version, then what it stands for: here and below
  Reader read_state(state_object.ptr());
  if (fresh && !optimizer.has_step) {
    for (py::handle param : py::reinterpret_borrow<py::object>(fresh)) fresh_params.push_back(param.ptr());
    std::sort(fresh_params.begin(), fresh_params.end());
  }
  // First all groups, whose values may run code of Python's to be read; then the parameters, of which it can take nothing away any more.
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); g++)
    check_group(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(param_groups, g)).ptr(), size_t(g));
  auto is_same = [](PyObject* dict, const SeenGroup& seen) {
    return dict == seen.dict && PyDict_GetItemWithError(dict, names->params) == seen.params && PyList_GET_SIZE(seen.params) == seen.count;
  };
  const char* reason = nullptr;
  for (size_t g = 0; g < seen_groups.size(); g++) {
    SeenGroup& seen = seen_groups[g];
    PyObject* dict = g < size_t(PyList_GET_SIZE(param_groups)) ? PyList_GET_ITEM(param_groups, Py_ssize_t(g)) : nullptr;
    if (!dict || !is_same(dict, seen)) raise(PyExc_RuntimeError, "param_groups changed while its values were read");
    seen.first = seen_params.size();
    for (Py_ssize_t i = 0; i < seen.count; i++) try {
      check_param(PyList_GET_ITEM(seen.params, i), dict, {g, size_t(i)}, read_state);
    } catch (const Outside& outside) {                // the others are checked all the same: torch's step would stop half-way
      if (!reason) reason = outside.reason;
    }
  }
  if (reason) throw Outside{reason};
}

// ---- a step like the one before

constexpr int64_t grain = 16384;          // work below which a second thread costs more than it brings
constexpr int64_t params_grain = 256;     // the same for parameters to compare or to count
constexpr int64_t release_gil = 1 << 19;  // work from which other Python threads shall run meanwhile; about 0.1 ms
constexpr size_t ahead = 4;               // parameters whose memory is asked for before it is read

// Whether everything is as `check` saw it, but for numbers and addresses, which are brought up to date. It calls nothing of Python's, so
// what a version stands for stays alive.
bool Plan::recheck(PyObject* self) {
  refuse_modes();
  const py::object groups_object = attribute(self, names->param_groups), state_object = attribute(self, names->state);
  PyObject* param_groups = groups_object.ptr();
  if (!PyList_Check(param_groups) || PyList_GET_SIZE(param_groups) != Py_ssize_t(seen_groups.size())) return false;
  if (!is_dict(state_object.ptr()) || version_of(state_object.ptr()) != state_version) return false;
  for (size_t g = 0; g < seen_groups.size(); g++)
    if (!recheck_group(PyList_GET_ITEM(param_groups, Py_ssize_t(g)), seen_groups[g], g)) return false;
  moved = false;
  std::atomic<bool> same{true};
  share_params(seen_params.size(), [&](size_t begin, size_t end) {
    if (!recheck_params(begin, end)) same = false;
  });
  if (!same || (moved && rows_overlap())) return false;
  for (size_t i = 0; i < scalars.size(); i++) {
    scalars_of[i].t = optimizer.has_step ? scalars_of[i].t + 1 : 2;
    compute_scalars(scalars_of[i], scalars[i]);
  }
  return true;
}

// Calls f(begin, end) for shares of parameters: on torch's threads, if the kernels will wake them anyway. The caller waits with the GIL,
// and f calls nothing of Python's.
template <class F> void Plan::share_params(size_t count, F f) const {
  if (work <= grain) return f(0, count);
  at::parallel_for(0, int64_t(count), params_grain, [&](int64_t begin, int64_t end) { f(size_t(begin), size_t(end)); });
}

// Asks for the memory that `recheck_param` will read: the objects of a parameter lie all over the heap.
C10_ALWAYS_INLINE void Plan::fetch(const SeenParam& seen) const {
  if (!seen.has_grad) return;
  const Written& w = (seen.on_gpu ? gpu : cpu).written[seen.row];
  for (const at::TensorImpl* t : {w.param, w.grad, w.slots[0], w.slots[1], w.slots[2], w.step})
    for (size_t at = 0; at < sizeof(at::TensorImpl); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(t) + at);
  for (PyObject* object : {seen.object, seen.entry, seen.slots[0], seen.slots[1], seen.slots[2], seen.step}) __builtin_prefetch(object);
}

bool Plan::recheck_group(PyObject* dict, SeenGroup& seen, size_t at) {
  if (dict != seen.dict || !is_dict(dict)) return false;
  if (const uint64_t version = version_of(dict); version != seen.version) {
    if (!is_simple_group(dict, optimizer, names->keys[index])) return false;
    seen.version = version, seen.params = PyDict_GetItemWithError(dict, names->params);
    if (!seen.params || !PyList_Check(seen.params)) return false;
    if (seen.group >= 0) {
      const Group group = read_group(dict, at, false);
      if (group.used != groups[size_t(seen.group)].used) return false;
      groups[size_t(seen.group)] = group;
    }
  }
  return PyList_GET_SIZE(seen.params) == seen.count;
}

bool Plan::recheck_params(size_t begin, size_t end) {
  if (begin == end) return true;
  auto begins_behind = [](size_t at, const SeenGroup& group) { return at < group.first; };
  auto group = std::upper_bound(seen_groups.begin(), seen_groups.end(), begin, begins_behind) - 1;
  for (size_t at = begin; at < end; ++group) {
    PyObject** const params = PySequence_Fast_ITEMS(group->params);
    for (const size_t upto = std::min(end, group->first + size_t(group->count)); at < upto; at++) {
      if (at + ahead < end) fetch(seen_params[at + ahead]);
      if (!recheck_param(params[at - group->first], seen_params[at])) return false;
    }
  }
  return true;
}

C10_ALWAYS_INLINE bool Plan::recheck_param(PyObject* object, const SeenParam& seen) {
  if (object != seen.object || Py_TYPE(object) != seen.type) return false;
  at::TensorImpl* param = THPVariable_Unpack(object).unsafeGetTensorImpl();
  const at::Tensor& grad_tensor = param->grad();
  if (grad_tensor.defined() != seen.has_grad) return false;
  if (!seen.has_grad) return true;
  at::TensorImpl* grad = grad_tensor.unsafeGetTensorImpl();
  Batch& batch = seen.on_gpu ? gpu : cpu;
  Row& row = batch.rows[seen.row];
  Written& w = batch.written[seen.row];
  if (param->key_set() != seen.keys || param->dtype() != seen.dtype || param->numel() != row.numel) return false;
  const Alike is_alike(param);
  if (!param->is_non_overlapping_and_dense() || !is_alike(grad)) return false;

  const int64_t size = itemsize(row.dtype[0]);
  bool differs = false;                           // an address
  auto read_address = [&](int k, const at::TensorImpl* t) {
    void* data = memory_or_null(t, size, k != 1, seen.device);
    differs |= row.data[k] != data;
    row.data[k] = data;
    return data || !row.numel;
  };
  w.param = param, w.grad = grad;
  if (!read_address(0, param) || !read_address(1, grad)) return false;
  if (seen.entry) {
    if (version_of(seen.entry) != seen.entry_version) return false;
    for (int k = 0; k < max_slots; k++) {
      if (!seen.slots[k]) continue;
      if (!is_exact(seen.slots[k])) return false;
      at::TensorImpl* slot = w.slots[k] = THPVariable_Unpack(seen.slots[k]).unsafeGetTensorImpl();
      if (!is_alike(slot) || !read_address(2 + k, slot)) return false;
    }
    if (seen.step) {
      if (!is_exact(seen.step)) return false;
      at::TensorImpl* step = w.step = THPVariable_Unpack(seen.step).unsafeGetTensorImpl();
      if (step->key_set() != seen.step_keys || step->dtype() != seen.step_dtype || step->numel() != 1) return false;
      w.count = memory_or_null(step, w.count_f64 ? 8 : 4, true, at::kCPU);
      if (!w.count) return false;
      const double t = w.count_f64 ? *static_cast<double*>(w.count) + 1.0 : *static_cast<float*>(w.count) + 1.0f;
      if (t != w.t + 1) return false;
      w.t = t;
    }
  }
  w.moved = differs;
  if (differs) {
    if (!moved) moved = true;                     // threads that only read it do not take it from each other
    extents[seen.extents] = extent_of(param, row.data[0], size, true, true);
    extents[seen.extents + 1] = extent_of(grad, row.data[1], size, true, false);
  }
  return true;
}

// Whether a parameter shares memory with another, or with a gradient: the rows must then be stepped in turn. The order by address is
// kept from step to step.
bool Plan::rows_overlap() {
  auto sorted = [&] {
    if (order.size() != extents.size()) return false;
    for (size_t i = 1; i < order.size(); i++)
      if (extents[order[i - 1]].begin > extents[order[i]].begin) return false;
    return true;
  };
  if (!sorted()) {
    order.resize(extents.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return extents[a].begin < extents[b].begin; });
  }
  uintptr_t reached = 0, written = 0;
  for (uint32_t i : order) {
    const Extent& extent = extents[i];
    if (extent.begin < (extent.written ? reached : written)) return true;
    reached = std::max(reached, extent.end);
    if (extent.written) written = std::max(written, extent.end);
  }
  return false;
}

// A parameter listed twice is stepped twice: its second row is one step further.
void Plan::count_repeated_steps() {
  std::unordered_map<at::TensorImpl*, int> seen;
  for (size_t r = 0; r < cpu.rows.size(); r++) {
    Written& w = cpu.written[r];
    const int before = seen[w.param]++;
    for (int i = 0; i < before; i++) w.t = w.count_f64 ? w.t + 1 : float(w.t) + 1.0f;
    if (before) w.scalars = scalars_for(w.group, w.t, cpu.rows[r].dtype[0] == DType::f64);
  }
}

// Stores the step counts, and tells autograd that the tensors change. Backwards: what was read last is still in the caches, and what is
// read first at the next step will be. Of a parameter listed twice, the later row has the higher count. Where parameters have a count in
// common, each row stores the same.
void Plan::count_steps(Batch& batch, bool as_before) {
  auto raise_to = [](auto* count, double t) { if (*count < t) *count = std::remove_reference_t<decltype(*count)>(t); };
  auto count = [&](size_t begin, size_t end) {
    for (size_t r = end; r-- > begin;) {
      const Written& w = batch.written[r];
      w.param->bump_version();
      for (int k = 0; k < optimizer.slots; k++)
        if (w.slots[k]) w.slots[k]->bump_version();
      if (!w.step) continue;
      if (w.count) w.count_f64 ? raise_to(static_cast<double*>(w.count), w.t) : raise_to(static_cast<float*>(w.count), w.t);
      w.step->bump_version();
    }
  };
  if (as_before) share_params(batch.written.size(), count);
  else count(0, batch.written.size());
}

void Plan::run_rows(const Row* first, const int64_t* upto, size_t count) {
  const int64_t total = upto[count - 1];
  auto run_share = [&](int64_t begin, int64_t end) { run(*isa, first, upto, count, begin, end); };
  if (total <= grain) run_share(0, total);
  else at::parallel_for(0, total, grain, run_share);
}

// What the rows of the CPU need to be run.
void Plan::lay_out(bool in_turn) {
  work = 0;
  const int64_t* at = dims.data();
  for (Layout& layout : layouts) {
    layout.sizes = at;
    for (int k = 0; k < max_operands; k++) layout.strides[k] = at + layout.ndim * (k + 1);
    at += layout.ndim * (1 + max_operands);
  }
  for (size_t r = 0; r < cpu.rows.size(); r++) {
    Row& row = cpu.rows[r];
    const int64_t layout = cpu.written[r].layout;
    row.layout = layout < 0 ? nullptr : &layouts[layout];
    row.scalars = &scalars[cpu.written[r].scalars];
    work += row.numel + row_cost;
    ends.push_back(in_turn ? row.numel + row_cost : work);
  }
}

void Plan::write(bool in_turn) {
  auto run_all = [&] {
    if (!in_turn) return run_rows(cpu.rows.data(), ends.data(), cpu.rows.size());
    for (size_t r = 0; r < cpu.rows.size(); r++) run_rows(&cpu.rows[r], &ends[r], 1);
  };
  if (work < release_gil) return run_all();
  auto hold = [&](at::TensorImpl* t) { if (t) alive.push_back(c10::intrusive_ptr<at::TensorImpl>::reclaim_copy(t)); };
  for (const Written& w : cpu.written) {
    hold(w.param), hold(w.grad);
    for (at::TensorImpl* slot : w.slots) hold(slot);
  }
  py::gil_scoped_release released;
  run_all();
}

PyObject* Plan::step(PyObject* self, PyObject* fresh) {
  if (busy) {                                       // another thread is in here, running kernels without the GIL
    Plan other(index);
    other.temporary = true;
    return other.step(self, fresh);
  }
  struct Call {
    Plan& plan;
    explicit Call(Plan& p) : plan(p) { plan.busy = true, plan.missing = nullptr; }
    ~Call() {
      plan.alive.clear(), plan.fresh_params.clear(), plan.values.clear();
      plan.busy = false;
      Py_XDECREF(plan.missing);
    }
  } call(*this);
  const bool comparing = kept && !fresh && checked_gpu_type == gpu_type;
  kept = false;                                     // until this step is done
  bool as_before = false, in_turn = false;
  try {
    ask_class(self);
    as_before = comparing && recheck(self);
    if (!as_before) {
      check(self, fresh);
      if (missing) return Py_NewRef(missing);
      in_turn = rows_overlap();
      if (in_turn && !gpu.rows.empty()) throw Outside{"on a GPU, parameters share memory"};
      if (in_turn && !fresh_params.empty()) throw Outside{"parameters share memory at their first step"};
      if (in_turn) count_repeated_steps();
      lay_out(in_turn);
    }
  } catch (const Outside& outside) {
    return PyUnicode_FromString(outside.reason);
  }
  const bool fit = as_before && images_fit();
  if (!gpu.rows.empty() && !fit)
    if (PyObject* wants = gpu_wants()) return wants;
  if (fresh && PyList_SetSlice(fresh, 0, PyList_GET_SIZE(fresh), nullptr)) throw python_error();   // from here on, it is written
  if (!cpu.rows.empty()) count_steps(cpu, as_before), write(in_turn);
  PyObject* launches = nullptr;
  if (!gpu.rows.empty()) {
    fit ? refresh_images() : fill_images();
    launches = gpu_launches();
    count_steps(gpu, as_before);
  }
  kept = comparable && !in_turn;
  return launches ? launches : Py_NewRef(Py_None);
}

// ---- the GPU half of the plan: the arrays of kernels/multi_tensor.py, and what of them changed

constexpr int64_t chunk = 4096;           // elements per program: CHUNK of kernels/multi_tensor.py

size_t Plan::bucket_of(const Row& row, c10::DeviceIndex device, bool capturable) {
  if (temporary) throw Outside{"two threads step GPU parameters of one optimizer"};
  DType state = row.dtype[0];
  for (int k = 0, first = 1; k < optimizer.slots; k++) {
    if (!(row.used >> k & 1)) continue;
    if (!first && row.dtype[2 + k] != state) throw Outside{"on a GPU, the state tensors of a parameter differ in dtype"};
    state = row.dtype[2 + k], first = 0;
  }
  for (size_t b = 0; b < buckets.size(); b++)
    if (buckets[b].device == device && buckets[b].used == row.used && buckets[b].param == row.dtype[0] && buckets[b].state == state &&
        buckets[b].capturable == capturable) return b;
  Bucket made;
  made.device = device, made.used = row.used, made.param = row.dtype[0], made.state = state, made.capturable = capturable;
  buckets.push_back(std::move(made));
  return buckets.size() - 1;
}

void Plan::set_buffer(size_t bucket, int64_t words, int64_t address) {
  buckets.at(bucket).capacity = words, buckets.at(bucket).base = address, buckets.at(bucket).current = false;
}

// Lays out the arrays of every bucket: work, table, scalars; or, if capturable: work, table, hypers, the numbers that hypers of the host
// point to, and behind the image the scalars, which the device computes. Returns ("gpu", (bucket, device, used, param dtype, state
// dtype, capturable, words), ...) of those that have no kernel yet or too small a buffer, to be answered by set_buffer and another
// call; or null.
PyObject* Plan::gpu_wants() {
  for (Bucket& b : buckets) b.rows = b.scalar_rows = b.groups = 0, b.last_scalars = b.last_group = -1;
  for (size_t r = 0; r < gpu.rows.size(); r++) {
    const Written& w = gpu.written[r];
    Bucket& b = buckets[w.bucket];
    if (size_t(b.rows) == b.numels.size()) b.numels.push_back(-1);
    if (b.numels[size_t(b.rows)] != gpu.rows[r].numel) b.numels[size_t(b.rows)] = gpu.rows[r].numel, b.current = false;
    b.rows++;
    if (b.capturable || int64_t(w.scalars) != b.last_scalars) b.scalar_rows++;
    b.last_scalars = int64_t(w.scalars);
    if (b.capturable && w.group != b.last_group) b.groups++, b.last_group = w.group;
  }
  py::list wants;
  for (size_t i = 0; i < buckets.size(); i++) {
    Bucket& b = buckets[i];
    const int64_t scalars_words = (b.scalar_rows * optimizer.scalars * (b.param == DType::f64 ? 8 : 4) + 7) / 8;
    if (size_t(b.rows) != b.numels.size()) b.numels.resize(size_t(b.rows)), b.current = false;
    if (!b.current) {
      b.programs = 0;
      for (int64_t numel : b.numels) b.programs += (numel + chunk - 1) / chunk;
    }
    b.table_at = b.programs;
    b.hypers_at = b.table_at + b.rows * (4 + optimizer.slots);
    b.numbers_at = b.hypers_at + (b.capturable ? b.rows * (1 + optimizer.numbers) : 0);
    b.scalars_at = b.numbers_at + b.groups * optimizer.numbers;
    const int64_t words = b.capturable ? b.scalars_at : b.scalars_at + scalars_words;
    if (int64_t(b.image.size()) != words) b.current = false;
    b.words = words;
    if (b.rows && b.scalars_at + scalars_words > b.capacity)
      wants.append(py::make_tuple(i, int(b.device), b.used, int(b.param), int(b.state), b.capturable, b.scalars_at + scalars_words));
  }
  if (wants.empty()) return nullptr;
  wants.insert(0, "gpu");
  return py::tuple(wants).release().ptr();
}

// Whether every image has the arrays that a step like the one before wants.
bool Plan::images_fit() const {
  return std::all_of(buckets.begin(), buckets.end(), [](const Bucket& b) { return b.current; });
}

void Plan::put(Bucket& b, int64_t at, int64_t word) {
  if (b.image[size_t(at)] == word) return;
  b.image[size_t(at)] = word;
  b.changed_from = std::min(b.changed_from, at), b.changed_to = std::max(b.changed_to, at + 1);
}

void Plan::put_addresses(Bucket& b, int64_t at, const Row& row) {
  for (int k = 0; k < 2 + optimizer.slots; k++) put(b, at + 2 + k, reinterpret_cast<int64_t>(row.data[k]));
}

void Plan::put_scalars(Bucket& b, size_t row, size_t from) {
  const size_t size = size_t(optimizer.scalars) * (b.param == DType::f64 ? 8 : 4), at = row * size;   // in bytes
  char* const to = reinterpret_cast<char*>(b.image.data() + b.scalars_at) + at;
  if (!std::memcmp(to, &scalars[from], size)) return;
  std::memcpy(to, &scalars[from], size);
  b.changed_from = std::min(b.changed_from, b.scalars_at + int64_t(at / 8));
  b.changed_to = std::max(b.changed_to, b.scalars_at + int64_t((at + size + 7) / 8));
}

// Brings every image up to date.
void Plan::fill_images() {
  for (Bucket& b : buckets) {
    b.image.resize(size_t(b.words));
    b.changed_from = b.current ? b.words : 0, b.changed_to = b.current ? 0 : b.words;
    b.rows = b.scalar_rows = b.groups = 0, b.last_scalars = b.last_group = -1;
    b.scalars.clear();
    if (b.current) continue;
    b.current = true;
    int64_t* work = b.image.data();
    for (size_t row = 0; row < b.numels.size(); row++)
      for (int64_t c = 0; c * chunk < b.numels[row]; c++) *work++ = int64_t(row) << 32 | c;
  }
  for (size_t r = 0; r < gpu.rows.size(); r++) {
    const Row& row = gpu.rows[r];
    Written& w = gpu.written[r];
    Bucket& b = buckets[w.bucket];
    if (b.capturable) {
      const Group& group = groups[w.group];
      const int64_t numbers = optimizer.numbers;
      if (w.group != b.last_group) {
        int64_t words[max_numbers];
        std::memcpy(words, group.numbers, sizeof words);
        for (int64_t i = 0; i < numbers; i++) put(b, b.numbers_at + b.groups * numbers + i, words[i]);
        b.groups++, b.last_group = w.group;
      }
      const int64_t at = b.hypers_at + b.rows * (1 + numbers), numbers_at = b.numbers_at + (b.groups - 1) * numbers;
      put(b, at, w.count_address);
      for (int64_t i = 0; i < numbers; i++) put(b, at + 1 + i, group.addresses[i] ? group.addresses[i] : b.base + 8 * (numbers_at + i));
      b.scalar_rows++;
    } else if (int64_t(w.scalars) != b.last_scalars) {
      put_scalars(b, size_t(b.scalar_rows++), w.scalars);
      b.scalars.push_back(w.scalars);
      b.last_scalars = int64_t(w.scalars);
    }
    w.table_at = b.table_at + b.rows++ * (4 + optimizer.slots);
    put(b, w.table_at, row.numel), put(b, w.table_at + 1, b.scalar_rows - 1);
    put_addresses(b, w.table_at, row);
  }
}

// The same where nothing but addresses and the values of scalars can differ.
void Plan::refresh_images() {
  for (Bucket& b : buckets) {
    b.changed_from = b.words, b.changed_to = 0;
    for (size_t row = 0; row < b.scalars.size(); row++) put_scalars(b, row, b.scalars[row]);
  }
  if (!moved) return;
  for (size_t r = 0; r < gpu.rows.size(); r++)
    if (const Written& w = gpu.written[r]; w.moved) put_addresses(buckets[w.bucket], w.table_at, gpu.rows[r]);
}

// Returns ((bucket, programs, table_at, scalars_at, changed from, to, address of the image, rows to prepare, hypers_at), ...), all but the
// address and the counts in words of 8 bytes; or null if there are none.
PyObject* Plan::gpu_launches() {
  py::list launches;
  for (size_t i = 0; i < buckets.size(); i++) {
    Bucket& b = buckets[i];
    const int64_t prepared = b.capturable ? b.rows : 0;
    if (!b.programs && !prepared) continue;
    launches.append(py::make_tuple(i, b.programs, b.table_at, b.scalars_at, b.changed_from, b.changed_to, reinterpret_cast<int64_t>(b.image.data()),
                                   prepared, b.hypers_at));
  }
  if (launches.empty()) return nullptr;
  return py::tuple(launches).release().ptr();
}

// The launch of a bucket failed: its step counts are what they were.
void Plan::take_back(size_t bucket) {
  for (const Written& w : gpu.written) {
    if (w.bucket != bucket || !w.count) continue;
    if (w.count_f64) *static_cast<double*>(w.count) = w.t - 1;
    else *static_cast<float*>(w.count) = float(w.t - 1);
  }
}

// ---- the module

int find_optimizer(const std::string& name) {
  for (size_t o = 0; o < optimizers.size(); o++)
    if (name == optimizers[o].name) return int(o);
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

// The optimizer's own plan, made at its first step. The optimizer holds it too, but code of Python's that a step runs may take it away.
py::object plan_of(PyObject* self) {
  py::object found = attribute(self, names->plan);
  if (Py_TYPE(found.ptr()) != plan_type) {
    py::handle optimizer = self;
    const int update = find_optimizer(py::cast<std::string>(optimizer.attr("_fastopt").attr("update")));
    found = py::reinterpret_steal<py::object>(plan_type->tp_alloc(plan_type, 0));
    if (!found) throw python_error();
    reinterpret_cast<PlanObject*>(found.ptr())->plan = new Plan(update);
    optimizer.attr("_fastopt_plan") = found;
  }
  return found;
}
Plan& in(const py::object& plan) { return *reinterpret_cast<PlanObject*>(plan.ptr())->plan; }

PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 1 || count > 2) raise(PyExc_TypeError, "step(optimizer, fresh=None)");
  const py::object plan = plan_of(args[0]);
  return in(plan).step(args[0], count == 2 ? args[1] : nullptr);
  END_HANDLE_TH_ERRORS
}

// Whether a profiler or an observer of torch wants to know of a range of the user's.
PyObject* watched(PyObject*, PyObject*) { return PyBool_FromLong(at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value()); }

PyMethodDef watched_method = {"watched", &watched, METH_NOARGS, "watched(): whether torch is being profiled or observed"};
PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)), METH_FASTCALL,
                           "step(optimizer, fresh=None): see csrc/bind.cpp"};

}  // namespace
}  // namespace fastopt

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastopt;
  names = new Names();
  plan_type = make_plan_type();
  if (!plan_type) throw py::error_already_set();
  m.attr("torch_version") = FASTOPT_TORCH_VERSION;
  py::object step_function = py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, nullptr));
  m.attr("step") = step_function;
  m.attr("watched") = py::reinterpret_steal<py::object>(PyCFunction_New(&watched_method, nullptr));
  m.def("isas", [] {
    std::vector<std::string> found;
    for (int i = 0; i < isa_count; i++)
      if (isas[i].supported()) found.push_back(isas[i].name);
    return found;
  });
  m.def("isa", [] { return isa->name; });
  m.def("set_isa", [](const std::string& name) {
    const char* before = isa->name;
    std::string known;
    for (int i = 0; i < isa_count; i++) {
      if (name == isas[i].name && isas[i].supported()) return isa = &isas[i], before;
      known += (i ? ", " : "") + (isas[i].name + std::string(isas[i].supported() ? "" : " (not on this processor)"));
    }
    raise(PyExc_ValueError, "ISA '" + name + "' is not available here; there are: " + known);
  });
  m.attr("gpu_chunk") = chunk;
  m.def("gpu_type", [] { return c10::DeviceTypeName(gpu_type, true); });
  m.def("set_gpu_type", [](const std::string& type) { gpu_type = c10::Device(type).type(); });
  m.def("set_buffer", [](py::object optimizer, size_t bucket, int64_t words, int64_t address) {
    in(plan_of(optimizer.ptr())).set_buffer(bucket, words, address);
  });
  m.def("take_back", [](py::object optimizer, size_t bucket) { in(plan_of(optimizer.ptr())).take_back(bucket); });
  m.def("counters", [] { return std::map<std::string, int64_t>{{"allocations", allocations}, {"checks", checks}}; });
  m.def("optimizers", [] {
    std::map<std::string, std::vector<std::string>> slots;
    for (const Optimizer& o : optimizers) slots[o.name].assign(o.slot_names, o.slot_names + o.slots);
    return slots;
  });
}
