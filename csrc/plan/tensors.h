// What is a tensor to us: dense memory of a device, with nothing between it and its numbers; a DTensor stands for its local tensor.
#pragma once
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COWDeleter.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <structmember.h>

#include "plan/python.h"
#include "step/dtypes.h"
#include "step/overlap.h"

namespace fastopt {

using at::TensorImpl;

// The device type that Triton serves: CUDA, which ROCm goes by too. Tests without a GPU let it serve CPU tensors.
inline c10::DeviceType gpu_type = c10::kCUDA;

inline c10::DeviceIndex index_of(c10::Device gpu) { return gpu.has_index() ? gpu.index() : c10::DeviceIndex(0); }

// torch's own operations shall run where something wants to see them.
inline void refuse_modes() {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) throw Outside{"a torch dispatch mode is active"};
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) throw Outside{"a torch.func transform is active"};
}

// ---- kinds

inline const uint64_t plain_keys = (c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
                                    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
                                    c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
                                    c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) |
                                    c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA)).raw_repr();

// A dense CPU or GPU tensor with nothing between it and its memory: no subclass, no lazy negation or conjugation, no transform.
inline bool is_plain(const TensorImpl* t) { return (t->key_set().raw_repr() & ~plain_keys) == 0; }

inline bool is_exact(PyObject* object) { return THPVariable_CheckTypeExact(Py_TYPE(object)); }   // a torch.Tensor or Parameter, of no subclass

inline TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

// The Python object of a tensor, or null if it has none yet.
template <class Slot> auto object_in(const Slot* slot, int) -> decltype(slot->load_pyobj()) { return slot->load_pyobj(); }
template <class Slot> PyObject* object_in(const Slot* slot, long) {   // up to torch 2.10
  const auto found = slot->check_pyobj();
  return found ? *found : nullptr;
}
inline PyObject* object_of(TensorImpl* t) { return object_in(t->pyobj_slot(), 0); }

// Whether a subclass has a say in what is done with its tensors; or in what their gradient is.
inline bool has_torch_function(PyObject* tensor) {
  static PyObject* const disabled = py::object(py::module_::import("torch._C").attr("_disabled_torch_function_impl")).release().ptr();
  return attribute(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), names::torch_function).ptr() != disabled;
}
inline bool has_own_grad(PyObject* tensor) {
  static PyObject* const grad = py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
  return attribute(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), names::grad).ptr() != grad;
}

inline bool dtype_of(const TensorImpl* t, DType& out) {
  switch (t->dtype().toScalarType()) {
    case at::kFloat: out = DType::f32; return true;
    case at::kDouble: out = DType::f64; return true;
    case at::kBFloat16: out = DType::bf16; return true;
    case at::kHalf: out = DType::f16; return true;
    default: return false;
  }
}
inline bool has_16_bits(const TensorImpl* t) { return t->dtype().toScalarType() == at::kBFloat16 || t->dtype().toScalarType() == at::kHalf; }
inline std::string dtype_text(const TensorImpl* t) { return c10::toString(t->dtype().toScalarType()); }

// ---- alike

inline bool same_sizes(const TensorImpl* a, const TensorImpl* b) {
  const at::IntArrayRef x = a->sizes(), y = b->sizes();
  bool same = x.size() == y.size();
  for (size_t d = 0; same && d < x.size(); d++) same = x[d] == y[d];
  return same;
}

// Whether a tensor is like `param` in layout and, but for the GPU's number, device, and of a certain dtype; and no subclass if that is
// none. Almost every gradient and state tensor is; then it needs few of the checks that the parameter passed.
class Alike {
 public:
  C10_ALWAYS_INLINE explicit Alike(const TensorImpl* param)
      : keys(param->key_set()), dtype(param->dtype()), sizes(param->sizes()), strides(param->strides()) {}
  C10_ALWAYS_INLINE bool operator()(const TensorImpl* t) const { return (*this)(t, dtype); }
  C10_ALWAYS_INLINE bool operator()(const TensorImpl* t, caffe2::TypeMeta wanted) const {
    if (t->key_set() != keys || t->dtype() != wanted) return false;
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

// ---- memory

// The address of the first element, null if there is no memory. mutable_data() gives a lazily copied tensor memory of its own.
C10_ALWAYS_INLINE void* address_of(const TensorImpl* t, int64_t itemsize, bool written) {
  c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
  auto* base = static_cast<char*>(written ? storage->mutable_data() : const_cast<void*>(storage->data()));
  return base ? base + t->storage_offset() * itemsize : nullptr;
}

// The same for any thread; null where it takes more: memory that is lazily copied and shall be written, is of another device, or missing.
C10_ALWAYS_INLINE void* address_or_null(const TensorImpl* t, int64_t itemsize, bool written, c10::Device device) {
  const c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
  const bool lazily_copied = storage->data_ptr().get_deleter() == c10::impl::cow::cow_deleter;
  return storage->device() != device || (written && lazily_copied) ? nullptr : address_of(t, itemsize, written);
}

// The memory of a tensor. An empty one has none; its own address tells whether it is there twice.
C10_ALWAYS_INLINE Extent extent_of(const TensorImpl* t, const void* data, int64_t itemsize, bool dense, bool written) {
  const auto begin = reinterpret_cast<uintptr_t>(data), own = reinterpret_cast<uintptr_t>(t);
  int64_t reach = t->numel();
  if (!reach) return {own, own + 1, written};
  if (!dense) {
    reach = 1;
    for (int64_t d = 0; d < t->dim(); d++) reach += (t->sizes()[d] - 1) * t->strides()[d];
  }
  return {begin, begin + uintptr_t(reach * itemsize), written};
}

// ---- DTensors

// A DTensor; its class is looked for only once torch.distributed.tensor is imported, which costs too much to do it here.
class DTensors {
 public:
  static bool is(PyObject* object) { return found() && reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }
  // Of a DTensor, borrowed from it. Both are fields of the object: reading them runs no code.
  static TensorImpl* local(PyObject* dtensor) { return impl_of(field(dtensor, local_at)); }
  static PyObject* spec(PyObject* dtensor) { return field(dtensor, spec_at); }

  // Whether two specs say the same. May run code of the user's.
  static bool same_placement(PyObject* a, PyObject* b) {
    if (a == b) return true;
    for (PyObject* name : {names::mesh, names::placements}) {
      const int equal = PyObject_RichCompareBool(attribute(a, name).ptr(), attribute(b, name).ptr(), Py_EQ);
      if (equal < 0) throw python_error();
      if (!equal) return false;
    }
    return true;
  }

  // The number of the shard that a DTensor's local tensor is; replicas have the same. May run code of the user's.
  static uint64_t shard(PyObject* spec) {
    const py::object mesh = attribute(spec, names::mesh), placements = attribute(spec, names::placements);
    const py::object coordinate = attribute(mesh.ptr(), names::get_coordinate)();
    uint64_t place = 0;
    if (coordinate.is_none()) return place;       // this rank has none of it
    for (size_t d = 0; d < py::len(placements); d++)
      if (!is_true(attribute(placements[py::int_(d)].ptr(), names::is_replicate)().ptr()))
        place = place * attribute(mesh.ptr(), names::size)(d).cast<uint64_t>() + coordinate[py::int_(d)].cast<uint64_t>();
    return place;
  }

 private:
  static bool found() {
    if (type) return true;
    static PyObject* const name = interned("torch.distributed.tensor");
    auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
    if (!module || !py::hasattr(module, "DTensor")) return PyErr_Clear(), false;
    py::object found = module.attr("DTensor");
    local_at = offset_of(found, "_local_tensor"), spec_at = offset_of(found, "_spec");
    if (local_at && spec_at) type = found.release().ptr();
    return type;
  }
  // Where in its objects a class has a slot; 0 if it has none of that name.
  static Py_ssize_t offset_of(const py::object& type, const char* name) {
    const py::object slot = py::getattr(type, name, py::none());
    if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) return 0;
    return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
  }
  static PyObject* field(PyObject* dtensor, Py_ssize_t at) {
    PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(dtensor) + at);
    if (!value) throw Outside{"a DTensor is not complete"};
    return value;
  }
  inline static PyObject* type = nullptr;
  inline static Py_ssize_t local_at = 0, spec_at = 0;
};

}  // namespace fastopt
