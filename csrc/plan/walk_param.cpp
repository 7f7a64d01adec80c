// The walk at one parameter: reading it with its gradient and state, checking what was read, and comparing with what was seen.
#include "plan/threads.h"
#include "plan/walk.h"

namespace fastopt {
namespace {

constexpr size_t fetched_ahead = 4;               // parameters whose memory is asked for before it is read

// A tensor that the step writes: torch's conditions for an in-place operation.
C10_NOINLINE void refuse_or_accept(TensorImpl* t, const char* name, Where where) {
  if (t->is_inference() && !c10::InferenceMode::is_enabled())
    raise(PyExc_RuntimeError, c10::str("Inplace update to inference tensor outside InferenceMode is not allowed: ", name, " of ", where,
                                       ". Make a clone outside of InferenceMode to get a normal tensor."));
  for (int64_t d = 0; d < t->dim(); d++)
    if (t->strides()[d] == 0 && t->sizes()[d] > 1)
      raise(PyExc_RuntimeError, c10::str("unsupported operation: more than one element of the written-to tensor refers to a single "
                                         "memory location (", name, " of ", where, "). Please clone() the tensor before performing the operation."));
}
void check_written(TensorImpl* t, const char* name, Where where) {
  if (!t->is_contiguous() || t->is_inference()) refuse_or_accept(t, name, where);
}

void* memory_of(const TensorImpl* t, int64_t itemsize, bool written, const char* name, Where where) {
  void* address = address_of(t, itemsize, written);
  if (!address && t->numel() > 0)
    raise(PyExc_RuntimeError, c10::str(name, " of ", where, " has ", t->numel(), " elements but no storage (was it freed or resized to 0?)"));
  return address;
}

DType check_grad(const TensorImpl* grad, const TensorImpl* param, DType param_dtype, bool may_be_f32, Where where) {
  DType dtype;
  if (grad->device() != param->device())
    raise(PyExc_RuntimeError, c10::str("grad of ", where, " is on ", grad->device(), ", the parameter on ", param->device()));
  if (!is_plain(grad)) throw Outside{"a gradient is sparse, a tensor subclass or not strided"};
  if (!dtype_of(grad, dtype) || (dtype != param_dtype && !(may_be_f32 && dtype == DType::f32))) throw Outside{"a gradient's dtype is not its parameter's"};
  if (!same_sizes(grad, param))
    raise(PyExc_RuntimeError, c10::str("grad of ", where, " has shape ", grad->sizes(), ", the parameter ", param->sizes()));
  return dtype;
}

[[noreturn]] void refuse_object(PyObject* object, const char* name, Where where) {
  raise(PyExc_TypeError, c10::str("state['", name, "'] of ", where, " must be a tensor, not ", Py_TYPE(object)->tp_name));
}
void check_shape(const TensorImpl* state, const TensorImpl* param, const char* name, Where where) {
  if (same_sizes(state, param)) return;
  raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " has shape ", state->sizes(), ", the parameter ", param->sizes(),
                                     ": move the state with the parameter, or delete its entry to start anew"));
}

void check_device(const TensorImpl* state, const TensorImpl* param, const char* name, Where where) {
  if (state->device() == param->device()) return;
  raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " is on ", state->device(), ", the parameter on ", param->device()));
}
[[noreturn]] void refuse_dtype(const TensorImpl* state, const TensorImpl* param, const char* name, Where where) {
  raise(PyExc_RuntimeError, c10::str("state['", name, "'] of ", where, " has dtype ", dtype_text(state), ", which the arithmetic for a ",
                                     dtype_text(param), " parameter does not hold"));
}

TensorImpl* tensor_or_null(PyObject* object) {    // isinstance may be a call into Python
  return object && (is_exact(object) || THPVariable_Check(object)) ? impl_of(object) : nullptr;
}

double next_count(const Written& w) {
  return w.count_f64 ? *static_cast<double*>(w.count) + 1.0 : *static_cast<float*>(w.count) + 1.0f;
}

}  // namespace

// ---- reading: may run code of the user's

void Walk::read_param(PyObject* object, Where where, SeenGroup& group, Reader& state_reader) {
  const bool exact = is_exact(object);
  if (!exact && !THPVariable_Check(object)) raise(PyExc_TypeError, c10::str("optimizer can only optimize Tensors, but ", where, " is ", Py_TYPE(object)->tp_name));
  found.push_back({});
  SeenParam& own = seen.emplace_back();
  Found& f = found.back();
  own.object = object, own.type = Py_TYPE(object), own.specs = -1, f.where = where;
  f.is_dtensor = !exact && DTensors::is(object), any_dtensor |= f.is_dtensor;
  try {
    if (!exact && !f.is_dtensor && has_own_grad(object)) throw Outside{"a parameter is of a class with a grad of its own"};
    comparable &= exact || f.is_dtensor;
    const at::Tensor& grad = impl_of(object)->grad();
    if (!grad.defined()) return;
    own.has_grad = true;
    f.operands[0] = hold(impl_of(object)), f.operands[1] = hold(grad.unsafeGetTensorImpl());
    if (f.is_dtensor) {
      const auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
      read_dtensor(object, hold(wrapped.ptr()), own, f);
    }
    f.foreign = !exact && !f.is_dtensor && has_torch_function(object);
    PyObject* wrapper = object_of(grad.unsafeGetTensorImpl());
    if (wrapper && !f.is_dtensor && !is_exact(wrapper) && has_torch_function(wrapper)) throw Outside{"a gradient is sparse, a tensor subclass or not strided"};
    if (group.group < 0) group.group = int64_t(options.add(group.dict, where.group));
    f.group = size_t(group.group);
    if (!algorithm.has_step && !state_of(f)) return;
    // Tensor.__hash__ is Python and too slow to call, but known: it is the address.
    PyObject* entry = state_reader(object, reinterpret_cast<Py_hash_t>(object), exact);
    own.entry = hold(entry);
    f.entry_is_dict = entry && is_dict(entry);
    if (entry && !f.entry_is_dict && PyObject_HasAttr(entry, names::keys)) throw Outside{"state of a parameter is a mapping, but no dict"};
    if (f.entry_is_dict) read_entry(entry, own, f);
  } catch (const Outside& outside) {
    f.outside = outside.reason;
  }
}

void Walk::read_entry(PyObject* entry, SeenParam& own, Found& f) {
  own.entry_version = version_of(entry, DictOf::state);
  Reader read(entry);
  const unsigned wanted = state_of(f);
  if (algorithm.has_step || wanted & draws_bit) own.step = hold(read(names::step));
  for (int k = 0; k < max_state; k++)
    if (wanted >> k & 1) own.state[k] = hold(read(state_key(k, f.operands[0])));
  if (wanted & draws_bit) {
    own.seed = hold(read(names::rounding_seed));
    if (f.is_dtensor) f.shard = DTensors::shard(specs[size_t(own.specs)][0].ptr());
  }
  f.step = hold(tensor_or_null(own.step));
  for (int k = 0; k < max_state; k++) {
    PyObject* tensor = own.state[k];
    TensorImpl*& operand = f.operands[2 + k];
    operand = hold(tensor_or_null(tensor));
    if (operand && !f.is_dtensor && !is_exact(tensor) && has_torch_function(tensor)) throw Outside{"a state tensor is a subclass"};
    if (!operand || !f.is_dtensor) continue;
    if (!DTensors::is(tensor)) throw Outside{"state of a DTensor is none"};
    auto& own_specs = specs[size_t(own.specs)];
    own_specs[size_t(2 + k)] = py::reinterpret_borrow<py::object>(DTensors::spec(tensor));
    operand = hold(DTensors::local(tensor));
    if (!DTensors::same_placement(own_specs[0].ptr(), specs[size_t(own.specs)][size_t(2 + k)].ptr())) throw Outside{"a DTensor and its state are placed differently"};
  }
}

void Walk::read_dtensor(PyObject* object, PyObject* grad, SeenParam& own, Found& f) {
  own.specs = int64_t(specs.size());
  specs.emplace_back();
  bool same = DTensors::is(grad);
  if (same) {
    const auto a = py::reinterpret_borrow<py::object>(DTensors::spec(object)), b = py::reinterpret_borrow<py::object>(DTensors::spec(grad));
    specs.back()[0] = a, specs.back()[1] = b;
    f.operands[0] = hold(DTensors::local(object)), f.operands[1] = hold(DTensors::local(grad));
    same = DTensors::same_placement(a.ptr(), b.ptr());
  }
  if (!same) throw Outside{"a DTensor and its gradient are placed differently"};
}

void Walk::add_missing(const SeenParam& own, const Found& f) {
  if (!missing) missing = PyList_New(0);
  PyObject* pair = missing ? PyTuple_Pack(2, seen_groups[f.where.group].dict, own.object) : nullptr;
  if (!pair || PyList_Append(missing, pair)) throw python_error();
  Py_DECREF(pair);
}

// ---- checking: runs no code of the user's

void Walk::check_param(SeenParam& own, const Found& f, bool gpu_allowed) {
  TensorImpl *param = f.operands[0], *grad = f.operands[1];
  const Where where = f.where;
  DType dtype;
  const c10::Device device = param->device();
  const bool on_gpu = device.type() == gpu_type, capturable = options[f.group].capturable;
  if (!on_gpu && device.type() != at::kCPU) throw Outside{"a parameter is on a device other than CPU and GPU"};
  if (capturable && (!on_gpu || !algorithm.has_step)) throw Outside{"capturable=True"};
  if (!is_plain(param) || f.foreign) throw Outside{"a parameter is a tensor subclass or not strided"};
  if (!dtype_of(param, dtype)) {
    const auto other = param->dtype().toScalarType();
    if (c10::isComplexType(other)) throw Outside{"a parameter is complex"};
    if (c10::isFloatingType(other)) throw Outside{"a parameter is of an 8-bit dtype"};
    raise(PyExc_RuntimeError, c10::str(where, " has dtype ", dtype_text(param), ": only floating point and complex parameters can be stepped"));
  }
  check_written(param, "data", where);
  const Alike alike(param);
  auto is_alike = [&](const TensorImpl* t, caffe2::TypeMeta wanted) { return alike(t, wanted) && (!on_gpu || t->device() == device); };
  bool all_alike = is_alike(grad, param->dtype());  // in layout, until one is found that is not
  DType grad_dtype = dtype;
  if (!all_alike) grad_dtype = check_grad(grad, param, dtype, itemsize(dtype) == 2, where), all_alike = is_alike(grad, grad->dtype());

  has_f64 |= grad_dtype == DType::f64, has_small_scalars |= grad_dtype != DType::f64 && !grad->dim();
  Batch& batch = on_gpu ? gpu : cpu;
  const unsigned used = options[f.group].used, wanted = state_of(f);
  own.on_gpu = on_gpu, own.keys = param->key_set(), own.dtype = param->dtype(), own.grad_dtype = grad->dtype(), own.device = device;
  own.row = batch.rows.size();
  Row& row = batch.rows.emplace_back();           // if it stays unfinished, nothing will be written
  Written& w = batch.written.emplace_back();
  Placed& place = batch.placed.emplace_back();
  row.algorithm = uint8_t(&algorithm - algorithms().data()), row.used = uint8_t(used), row.numel = param->numel();
  w.param = param, w.grad = grad, place.group = f.group, place.moved = true;
  row.dtype[0] = dtype, row.dtype[1] = grad_dtype;
  row.data[0] = memory_of(param, itemsize(dtype), true, "data", where);
  row.data[1] = memory_of(grad, itemsize(grad_dtype), false, "grad", where);

  if (algorithm.has_step || wanted) {
    if (!own.entry || (f.entry_is_dict && PyDict_GET_SIZE(own.entry) == 0)) return add_missing(own, f);
    if (!f.entry_is_dict) raise(PyExc_TypeError, c10::str("state of ", where, " must be a dict, not ", Py_TYPE(own.entry)->tp_name));
    if (algorithm.has_step && !check_count(own, f, batch, capturable)) return add_missing(own, f);
    for (int k = 0; k < max_state; k++) {
      if (!(wanted >> k & 1)) continue;
      const bool may_lack = !algorithm.has_step || k >= max_slots;   // else a state without it is incomplete
      if (may_lack && (!own.state[k] || own.state[k] == Py_None)) return add_missing(own, f);
      TensorImpl* tensor = f.operands[2 + k];
      if (k == companion_slot) {
        if (tensor && tensor->dtype().toScalarType() != (dtype == DType::bf16 ? at::kShort : at::kFloat)) return add_missing(own, f);
        row.dtype[2 + k] = dtype == DType::bf16 ? dtype : DType::f32;
        if (!tensor || !is_alike(tensor, tensor->dtype())) check_state(own, f, k, dtype), all_alike = all_alike && is_alike(tensor, tensor->dtype());
      } else if (tensor && is_alike(tensor, param->dtype())) {
        row.dtype[2 + k] = dtype;
      } else {
        row.dtype[2 + k] = check_state(own, f, k, dtype);
        all_alike = all_alike && is_alike(tensor, tensor->dtype());
      }
      own.state_dtypes[k] = tensor->dtype();
      w.state[k] = tensor;
      row.data[2 + k] = memory_of(tensor, itemsize(row.dtype[2 + k]), true, PyUnicode_AsUTF8(state_key(k, param)), where);
    }
    const bool draws = wanted & draws_bit;
    if (draws) {
      if (!algorithm.has_step && (!own.step || own.step == Py_None || !check_count(own, f, batch, capturable))) return add_missing(own, f);
      if (!own.seed || !PyLong_Check(own.seed)) return add_missing(own, f);
      const uint64_t seed = PyLong_AsUnsignedLongLong(own.seed);
      if (PyErr_Occurred()) return PyErr_Clear(), add_missing(own, f);   // which refuses it
      const uint64_t position = uint64_t(&own - seen.data()) + f.shard * seen.size();
      row.draws = {seed, uint64_t(w.t), uint32_t(position)};
    }
  }
  const bool is_first = !algorithm.has_step && std::binary_search(fresh_params.begin(), fresh_params.end(), own.object);
  if (!capturable) place.scalars = options.scalars_for(f.group, algorithm.has_step ? w.t : is_first ? 1 : 2, computes_in_f64(dtype));
  const bool simple = all_alike && param->is_non_overlapping_and_dense();
  comparable = comparable && simple && !param->is_inference();
  const int64_t layout = place.layout = simple ? -1 : layout_of(f.operands);
  own.extents = extents.add(extent_of(param, row.data[0], itemsize(dtype), layout < 0, true));
  extents.add(extent_of(grad, row.data[1], itemsize(grad_dtype), layout < 0, false));
  if (!on_gpu) {
    work += row.numel + row_cost;
    return;
  }
  const bool averages = wanted >> average_slot & 1;
  if (averages && row.dtype[2 + average_slot] != (computes_in_f64(dtype) ? DType::f64 : DType::f32)) throw Outside{"on a GPU, a running average of 16 bits"};
  if (layout >= 0) throw Outside{"on a GPU, a parameter, its gradient and state differ in strides"};
  const c10::DeviceIndex hypers_on = options[f.group].device;
  if (hypers_on >= 0 && hypers_on != index_of(device)) throw Outside{"a hyper-parameter is on another GPU than a parameter"};
  if (!gpu_allowed) throw Outside{"two threads step GPU parameters of one optimizer"};
  DType state_dtype = dtype;
  for (int k = 0, first = 1; k < algorithm.slots; k++) {
    if (!(used >> k & 1)) continue;
    if (!first && row.dtype[2 + k] != state_dtype) throw Outside{"on a GPU, the state tensors of a parameter differ in dtype"};
    state_dtype = row.dtype[2 + k], first = 0;
  }
  place.image = images.find({index_of(device), used, dtype, state_dtype, capturable, averages, grad_dtype, bool(wanted >> companion_slot & 1), bool(wanted & draws_bit)});
}

DType Walk::check_state(const SeenParam& own, const Found& f, int k, DType param_dtype) const {
  const Where where = f.where;
  const TensorImpl* param = f.operands[0];
  const char* name = PyUnicode_AsUTF8(state_key(k, param));
  TensorImpl* tensor = f.operands[2 + k];
  DType dtype;
  if (!own.state[k]) raise(PyExc_KeyError, c10::str("state['", name, "'] of ", where, " is missing: delete the entry to start anew, or load a complete state"));
  if (!tensor) refuse_object(own.state[k], name, where);
  check_device(tensor, param, name, where);
  if (!is_plain(tensor)) throw Outside{"a state tensor is not a plain strided tensor"};
  check_shape(tensor, param, name, where);
  if (k == companion_slot) return check_written(tensor, name, where), param_dtype;   // its dtype is known
  if (!dtype_of(tensor, dtype) || (dtype == DType::f64 && param_dtype != DType::f64)) refuse_dtype(tensor, param, name, where);
  check_written(tensor, name, where);
  return dtype;
}

void Walk::check_averages() {
  only_averaged = {};
  for (size_t g = 0; g < seen_groups.size(); g++)
    for (size_t i = 0; i < size_t(seen_groups[g].count); i++) {
      const SeenParam& own = seen[seen_groups[g].first + i];
      if (own.has_grad) continue;
      PyObject* entry = _PyDict_GetItem_KnownHash(state, own.object, reinterpret_cast<Py_hash_t>(own.object));
      const py::object average = entry && is_dict(entry) ? item_of(entry, names::ema) : py::object();
      if (PyErr_Occurred()) throw python_error();
      if (!average || average.is_none()) continue;   // none has begun
      const Where where = {g, i};
      const TensorImpl* param = impl_of(own.object);
      TensorImpl* tensor = tensor_or_null(average.ptr());
      if (!tensor) refuse_object(average.ptr(), "ema", where);
      check_shape(tensor, param, "ema", where);
      check_device(tensor, param, "ema", where);
      const auto dtype = tensor->dtype().toScalarType();
      if (!c10::isFloatingType(dtype) && dtype != param->dtype().toScalarType()) refuse_dtype(tensor, param, "ema", where);
      check_written(tensor, "ema", where);
      if (!only_averaged) only_averaged = py::list();
      py::reinterpret_borrow<py::list>(only_averaged).append(py::handle(own.object));
    }
}

// Reads the step count; false if it is a number or elsewhere, and must be made a tensor that can be read here.
bool Walk::check_count(SeenParam& own, const Found& f, Batch& batch, bool capturable) {
  Written& w = batch.written.back();
  TensorImpl* step = f.step;
  DType count;
  if (!own.step) raise(PyExc_KeyError, c10::str("state['step'] of ", f.where, " is missing: delete the entry to start anew, or load a complete state"));
  if (!step) {
    if (!PyNumber_Check(own.step)) raise(PyExc_TypeError, c10::str("state['step'] of ", f.where, " must be a number, not ", Py_TYPE(own.step)->tp_name));
    return false;
  }
  if (step->numel() != 1) raise(PyExc_RuntimeError, c10::str("state['step'] of ", f.where, " must have one element, not shape ", step->sizes()));
  const bool is_number = is_plain(step) && dtype_of(step, count) && (count == DType::f32 || count == DType::f64);
  if (!is_number || (capturable ? step->device() != own.device : step->device_type() != at::kCPU)) return false;
  check_written(step, "state['step']", f.where);
  own.step_keys = step->key_set(), own.step_dtype = step->dtype();
  comparable = comparable && is_exact(own.step) && !step->is_inference();
  void* memory = memory_of(step, itemsize(count), true, "state['step']", f.where);
  w.step = step, w.count_f64 = count == DType::f64;
  if (capturable) batch.placed.back().count_address = reinterpret_cast<int64_t>(memory) + (count == DType::f32);
  else w.count = memory, w.t = next_count(w);
  return true;
}

// The place in `layouts` of operands that do not walk memory in one order; -1 if they do.
int64_t Walk::layout_of(TensorImpl* const* operands) {
  const TensorImpl* param = operands[0];
  bool contiguous = true, same = param->is_non_overlapping_and_dense();
  Strides strides = {int(param->dim()), param->sizes().data(), {}};
  for (int k = 0; k < max_operands; k++) {
    if (!operands[k]) continue;
    contiguous = contiguous && operands[k]->is_contiguous();
    same = same && operands[k]->strides() == param->strides();
    strides.of[k] = operands[k]->strides().data();
  }
  return contiguous || same || param->numel() == 0 ? -1 : layouts.add(strides);
}

// ---- comparing: runs no code of the user's; on any thread, but for DTensors

// Asks for the memory that compare_param will read: the objects of a parameter lie all over the heap.
C10_ALWAYS_INLINE void Walk::prefetch(const SeenParam& own) const {
  if (!own.has_grad) return;
  const Written& w = (own.on_gpu ? gpu : cpu).written[own.row];
  auto fetch = [](const TensorImpl* t) {
    for (size_t at = 0; at < sizeof(TensorImpl); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(t) + at);
  };
  for (const TensorImpl* t : {w.param, w.grad, w.step}) fetch(t);
  for (const TensorImpl* t : w.state) fetch(t);
  for (PyObject* object : {own.object, own.entry, own.step}) __builtin_prefetch(object);
  for (PyObject* object : own.state) __builtin_prefetch(object);
}

bool Walk::compare_params(size_t begin, size_t end, int steps) {
  if (begin == end) return true;
  auto begins_behind = [](size_t at, const SeenGroup& group) { return at < group.first; };
  auto group = std::upper_bound(seen_groups.begin(), seen_groups.end(), begin, begins_behind) - 1;
  for (size_t at = begin; at < end; ++group) {
    PyObject** const params = PySequence_Fast_ITEMS(group->params);
    for (const size_t upto = std::min(end, group->first + size_t(group->count)); at < upto; at++) {
      if (at + fetched_ahead < end) prefetch(seen[at + fetched_ahead]);
      if (!compare_param(params[at - group->first], seen[at], steps)) return false;
    }
  }
  return true;
}

// `steps`: by how many the count has risen since.
C10_ALWAYS_INLINE bool Walk::compare_param(PyObject* object, SeenParam& own, int steps) {
  if (object != own.object || Py_TYPE(object) != own.type) return false;
  TensorImpl* param = impl_of(object);
  const at::Tensor& grad_tensor = param->grad();
  if (grad_tensor.defined() != own.has_grad) return false;
  if (!own.has_grad) return true;
  TensorImpl* grad = grad_tensor.unsafeGetTensorImpl();
  Batch& batch = own.on_gpu ? gpu : cpu;
  Row& row = batch.rows[own.row];
  Written& w = batch.written[own.row];
  const Specs* const spec = own.specs < 0 ? nullptr : &specs[size_t(own.specs)];
  // The tensor that an object is or, if it is a DTensor placed as before, its local tensor; else null.
  auto unpack = [&](PyObject* tensor, int k) C10_ALWAYS_INLINE_ATTRIBUTE -> TensorImpl* {
    if (!spec) return is_exact(tensor) ? impl_of(tensor) : nullptr;
    return DTensors::is(tensor) && DTensors::spec(tensor) == (*spec)[size_t(k)].ptr() ? DTensors::local(tensor) : nullptr;
  };
  if (PyObject* wrapper = object_of(grad); wrapper && !spec && !is_exact(wrapper)) return false;
  if (spec) {
    const auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad_tensor));
    param = unpack(object, 0), grad = unpack(wrapped.ptr(), 1);
    if (!param || !grad) return false;
  }
  if (param->key_set() != own.keys || param->dtype() != own.dtype || param->numel() != row.numel) return false;
  const Alike is_alike(param);
  if (!param->is_non_overlapping_and_dense() || !is_alike(grad, own.grad_dtype)) return false;

  bool differs = false;                           // an address
  auto read_address = [&](int k, const TensorImpl* t) C10_ALWAYS_INLINE_ATTRIBUTE {
    void* data = address_or_null(t, itemsize(row.dtype[k]), k != 1, own.device);
    differs |= row.data[k] != data;
    row.data[k] = data;
    return data || !row.numel;
  };
  w.param = param, w.grad = grad;
  if (!read_address(0, param) || !read_address(1, grad)) return false;
  if (own.entry) {
    if (states_changed && !has_version(own.entry, own.entry_version)) return false;
    for (int k = 0; k < max_state; k++) {
      if (!own.state[k]) continue;
      TensorImpl* tensor = w.state[k] = unpack(own.state[k], 2 + k);
      if (!tensor || !is_alike(tensor, own.state_dtypes[k]) || !read_address(2 + k, tensor)) return false;
    }
    if (own.step) {
      if (!is_exact(own.step)) return false;
      TensorImpl* step = w.step = impl_of(own.step);
      if (step->key_set() != own.step_keys || step->dtype() != own.step_dtype || step->numel() != 1) return false;
      const bool on_host = w.count;
      void* count = address_or_null(step, w.count_f64 ? 8 : 4, true, on_host ? c10::Device(at::kCPU) : own.device);
      if (!count) return false;
      if (on_host) {
        w.count = count;
        const double t = next_count(w);
        if (t != w.t + steps) return false;
        w.t = t, row.draws.step = uint64_t(t);
      } else {
        const int64_t address = reinterpret_cast<int64_t>(count) + !w.count_f64;
        differs |= batch.placed[own.row].count_address != address;
        batch.placed[own.row].count_address = address;
      }
    }
  }
  if (own.on_gpu) batch.placed[own.row].moved = differs || (!steps && batch.placed[own.row].moved);   // in this step
  if (differs) {
    if (!moved) moved = true;                     // threads that only read it do not take it from each other
    extents[own.extents] = extent_of(param, row.data[0], itemsize(row.dtype[0]), true, true);
    extents[own.extents + 1] = extent_of(grad, row.data[1], itemsize(row.dtype[1]), true, false);
  }
  return true;
}

}  // namespace fastopt
