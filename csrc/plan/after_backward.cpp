// Norms, clipping, averaging and zeroing: first the rows and the passes over them, then the functions of the module.
#include "plan/after_backward.h"

#include <memory>

#include "plan/gpu_passes.h"
#include "plan/norm.h"
#include "plan/threads.h"
#include "step/passes.h"

namespace fastopt {

// ---- rows

void Rows::begin() {
  if (on_gpu()) drop_from(0);                     // the image of the GPU compares them
  layouts.clear();
  count = 0, dtypes = 0, empty_rows = small_scalars = false;
}

void Rows::add(TensorImpl* to, TensorImpl* from) {
  if (count == rows.size() || !is_as_before(rows[count], made[count], to, from)) drop_from(count), make_row(to, from);
  made[count].written = to, made[count].read = from;
  const Row& row = rows[count++];
  dtypes |= 1u << int(row.dtype[0]), empty_rows |= !row.numel;
  small_scalars |= row.dtype[0] != DType::f64 && !(to ? to : from)->dim();
}

void Rows::end() {
  if (count < rows.size()) drop_from(count);
  work = rows.empty() ? 0 : ends.back();
  tiles = rows.empty() ? 0 : firsts.back() + size_t(tiles_of(rows.back()));
}

void Rows::release() {
  if (!held.empty()) held.clear(), alive.clear();
}

void Rows::drop_from(size_t row) {
  rows.resize(row), made.resize(row), ends.resize(row), firsts.resize(row);
  moved = true;
}

// Whether a row needs but its addresses, which are brought up to date.
C10_ALWAYS_INLINE bool Rows::is_as_before(Row& row, const Made& before, TensorImpl* to, TensorImpl* from) {
  TensorImpl* const main = to ? to : from;
  if (main->key_set() != before.keys || main->dtype() != before.dtype || main->numel() != row.numel) return false;
  if (before.layout >= 0 || !main->is_non_overlapping_and_dense() || main->is_inference()) return false;
  if (from && from != main && !Alike(main)(from)) return false;
  const int64_t size = itemsize(row.dtype[0]);
  void* const written = to ? address_or_null(to, size, true, c10::kCPU) : nullptr;
  void* const read = from == to ? written : from ? address_or_null(from, size, false, c10::kCPU) : nullptr;
  if (((to && !written) || (from && !read)) && row.numel) return false;
  if (written != row.data[0] || read != row.data[1]) row.data[0] = written, row.data[1] = read, moved = true;
  return true;
}

void Rows::make_row(TensorImpl* to, TensorImpl* from) {
  TensorImpl* const main = to ? to : from;
  DType dtype;
  const bool gpu = is_plain(main) && main->device_type() == gpu_type;
  if (!is_plain(main) || (!gpu && main->device_type() != at::kCPU)) throw Outside{"a tensor is sparse, a subclass, or not on CPU or GPU"};
  if (rows.empty()) device = main->device();
  else if (main->device() != device) throw Outside{"tensors on several devices"};
  if (!dtype_of(main, dtype)) throw Outside{"a tensor is of another dtype than float32, float64, bfloat16 and float16"};
  if (to && to->is_inference() && !c10::InferenceMode::is_enabled()) throw Outside{"an inference tensor"};
  Row row = {};
  row.numel = main->numel();
  row.dtype[0] = row.dtype[1] = dtype;
  row.scalars = &scalars[int(dtype)];
  Strides strides = {int(main->dim()), main->sizes().data(), {}};
  bool dense = main->is_non_overlapping_and_dense();
  auto take = [&](int k, TensorImpl* t) {
    if (!t) return;
    if (t != main && !Alike(main)(t)) {
      if (!is_plain(t) || t->device() != device || t->dtype() != main->dtype() || !same_sizes(t, main)) throw Outside{"an average and its value differ in shape, dtype or device"};
      dense = false;
    }
    row.data[k] = address_of(t, itemsize(dtype), k == 0);
    if (!row.data[k] && row.numel) throw Outside{"a tensor has no storage"};
    strides.of[k] = t->strides().data();
  };
  take(0, to), take(1, from);
  if (gpu && (!dense || (to && from && to->device() != from->device()))) throw Outside{"a tensor on a GPU with gaps, strides of its own, or on another"};
  if (!dense) {
    if (!strides.of[0]) strides.of[0] = strides.of[1];
    for (int d = 0; d < strides.ndim; d++)
      if (to && strides.sizes[d] > 1 && strides.of[0][d] == 0) throw Outside{"a tensor shares memory with itself"};
  }
  made.push_back({to, from, main->key_set(), main->dtype(), dense || !row.numel ? -1 : layouts.add(strides)});
  firsts.push_back(rows.empty() ? 0 : firsts.back() + size_t(tiles_of(rows.back())));
  ends.push_back((rows.empty() ? 0 : ends.back()) + row.numel + row_cost);
  rows.push_back(row);
}

// Whether a tensor that is written shares memory with another.
bool Rows::overlap() {
  if (!moved) return overlapping;
  extents.clear();
  for (size_t r = 0; r < rows.size(); r++) {
    TensorImpl *const to = made[r].written, *const from = made[r].read;
    const int64_t size = itemsize(rows[r].dtype[0]);
    const bool dense = made[r].layout < 0;
    if (to) extents.add(extent_of(to, rows[r].data[0], size, dense, true));
    if (from && from != to) extents.add(extent_of(from, rows[r].data[1], size, dense, false));
  }
  moved = false;
  return overlapping = extents.overlap();
}

void Rows::bump_versions() {
  for (const Made& own : made)
    if (own.written) own.written->bump_version();
}

// Large work lets other Python threads run meanwhile, which may drop the tensors.
template <class F> void Rows::without_gil(F f) {
  layouts.finish();
  for (size_t r = 0; r < rows.size(); r++)
    if (made[r].layout >= 0) rows[r].layout = layouts[made[r].layout];
  if (work < release_gil) return f();
  for (const Made& own : made)
    for (TensorImpl* t : {own.written, own.read})
      if (t) held.push_back(c10::intrusive_ptr<TensorImpl>::reclaim_copy(t)), alive.push_back(t->unsafe_storage());
  py::gil_scoped_release released;
  f();
}

double Rows::norm(Norm norm, const Stages& stages) {
  if (rows.empty()) return 0;
  numbers.resize(tiles);
  without_gil([&] { share_reading(*isa, norm, rows.data(), ends.data(), firsts.data(), rows.size(), numbers.data(), stages); });
  return total(norm, numbers);
}

PyObject* Rows::for_gpu(const Answers& answers, double number, Norm norm, double order) {
  if (overlap()) throw Outside{"tensors on a GPU share memory"};
  bump_versions();
  size_t place;
  const Made& first = made.front();
  PassImage& image = pass_image(c10::Device(device.type(), index_of(device)), first.written && first.read && first.written != first.read, place);
  image.fill(rows);
  return image.answer(answers, place, number, norm, order).release().ptr();
}

void Rows::run_rows(size_t pass) {
  const auto algorithm = uint8_t(pass);
  for (Row& row : rows)
    if (row.algorithm != algorithm) row.algorithm = algorithm;
  bump_versions();
  const bool in_turn = overlap();
  without_gil([&] {
    if (in_turn) share_rows_in_turn(*isa, rows.data(), rows.size());
    else share_rows(*isa, rows.data(), ends.data(), rows.size());
  });
}

namespace {

// A number as a dtype holds it: the limits of torch.clamp are.
double rounded_to(DType dtype, double number) {
  if (dtype == DType::f32) return float(number);
  if (dtype == DType::bf16) return float(c10::BFloat16(float(number)));
  if (dtype == DType::f16) return float(c10::Half(float(number)));
  return number;
}

}  // namespace

template <class Pass> void Rows::run(double number) {
  if (rows.empty()) return;
  for (int d = 0; d < dtype_count; d++) {
    const double own = std::is_same_v<Pass, Clamp> ? rounded_to(DType(d), number) : number;
    if (computes_in_f64(DType(d))) new (&scalars[d]) typename Pass::template Scalars<double>{double(own)};
    else new (&scalars[d]) typename Pass::template Scalars<float>{float(own)};
  }
  run_rows(pass_at<Pass>);
}

void Rows::zero() {
  if (rows.empty()) return;
  bump_versions();
  without_gil([&] {
    share(work, [&](int64_t begin, int64_t end) {
      for_share(rows.data(), ends.data(), rows.size(), begin, end, line, [&](size_t r, int64_t from, int64_t upto) {
        const int64_t size = itemsize(rows[r].dtype[0]);
        std::memset(static_cast<char*>(rows[r].data[0]) + from * size, 0, size_t((upto - from) * size));
      });
    });
  });
}

// ---- functions

namespace {

// What a function keeps from call to call.
struct Kept {
  Rows rows;
  bool busy = false;
};
template <auto function> Kept& kept() {
  static auto* const made = new Kept();
  return *made;
}

// The rows of one call of a function.
class Call {
 public:
  Call(const Answers& answers, Kept& kept) : answers(answers), kept(kept) {
    refuse_modes();
    if (kept.busy) own = std::make_unique<Rows>();   // another thread is in here, without the GIL
    else kept.busy = true;
    rows().begin();
  }
  ~Call() {
    if (!own) kept.rows.release(), kept.busy = false;   // what dies may run code that comes back here
  }
  Rows& rows() { return own ? *own : kept.rows; }

  // The items of a list or tuple, or a tensor as the only one. Runs no code of the user's.
  template <class F> void for_items(PyObject* object, F f) {
    if (is_exact(object)) return f(object), rows().end();
    if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) throw Outside{"no list of tensors"};
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); i++) {
      PyObject* item = PySequence_Fast_GET_ITEM(object, i);
      if (!is_exact(item)) throw Outside{"a tensor is a subclass"};
      f(item);
    }
    rows().end();
  }
  // The gradients of parameters.
  template <class F> void for_grads(PyObject* parameters, F f) {
    for_items(parameters, [&](PyObject* parameter) {
      const at::Tensor& grad = impl_of(parameter)->grad();
      if (!grad.defined()) return;
      PyObject* wrapper = object_of(grad.unsafeGetTensorImpl());
      if (wrapper && !is_exact(wrapper)) throw Outside{"a gradient is a tensor subclass"};
      f(grad.unsafeGetTensorImpl());
    });
  }
  PyObject* done() const { return Py_NewRef(answers.DONE); }

 private:
  std::unique_ptr<Rows> own;
  const Answers& answers;
  Kept& kept;
};

// What float(object) is. May run code of the user's.
double as_number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(object));
  if (!number) throw python_error();
  return PyFloat_AS_DOUBLE(number.ptr());
}

Norm norm_of(double order, const Rows& rows) {
  if (order != 2 && order != 1 && order != INFINITY) throw Outside{"a norm other than 1, 2 and inf"};
  if (order == INFINITY && rows.any_empty()) throw Outside{"an empty tensor has no largest element"};
  return order == 2 ? Norm::squares : order == 1 ? Norm::sum : Norm::largest;
}

// `value`: the norm as the tensor holds it.
at::Tensor norm_of_rows(Rows& rows, double order, bool error_if_nonfinite, double& value) {
  const Norm norm = norm_of(order, rows);
  const bool f64 = rows.has(DType::f64) || (rows.empty() && c10::get_default_dtype_as_scalartype() == at::kDouble);   // torch.tensor(0.0)
  value = rows.norm(norm);
  if (!f64) value = float(value);
  if (error_if_nonfinite && !std::isfinite(value)) raise_nonfinite(order);
  return scalar_tensor(value, f64);
}

}  // namespace

PyObject* clip_grad_norm(const Answers& answers, PyObject* const* args) {
  const double max_norm = as_number(args[1]), order = as_number(args[2]);
  const bool error_if_nonfinite = is_true(args[3]);
  Call call(answers, kept<&fastopt::clip_grad_norm>());
  Rows& rows = call.rows();
  call.for_grads(args[0], [&](TensorImpl* grad) { rows.add_both(grad); });
  if (rows.has(DType::f64) && rows.has_small_scalars()) throw Outside{"a gradient without dimensions and a norm of another dtype"};
  if (rows.on_gpu()) return rows.for_gpu(answers, max_norm, norm_of(order, rows), order);
  double value;
  at::Tensor norm = norm_of_rows(rows, order, error_if_nonfinite, value);
  const double factor = clip_coefficient(max_norm, value, rows.has(DType::f64));
  if (factor != 1) rows.run<Scale>(factor);
  return THPVariable_Wrap(std::move(norm));
}

PyObject* total_norm(const Answers& answers, PyObject* const* args) {
  const double order = as_number(args[1]);
  const bool error_if_nonfinite = is_true(args[2]);
  Call call(answers, kept<&fastopt::total_norm>());
  Rows& rows = call.rows();
  call.for_items(args[0], [&](PyObject* tensor) { rows.add_read(impl_of(tensor)); });
  if (rows.on_gpu()) return rows.for_gpu(answers, INFINITY, norm_of(order, rows), order);
  double value;
  return THPVariable_Wrap(norm_of_rows(rows, order, error_if_nonfinite, value));
}

PyObject* norm(const Answers& answers, PyObject* const* args) {
  const double order = as_number(args[1]);
  Call call(answers, kept<&fastopt::norm>());
  Rows& rows = call.rows();
  call.for_items(args[0], [&](PyObject* tensor) { rows.add_read(impl_of(tensor)); });
  if (rows.on_gpu()) throw Outside{"shards on a GPU"};
  return PyFloat_FromDouble(rows.norm(norm_of(order, rows)));
}

PyObject* search(const Answers& answers, PyObject* const* args) {
  Stages stages;
  stages.factors = 1, stages.factor[0] = as_number(args[1]);
  Call call(answers, kept<&fastopt::search>());
  Rows& rows = call.rows();
  call.for_grads(args[0], [&](TensorImpl* grad) { rows.add_read(grad); });
  if (rows.on_gpu()) throw Outside{"gradients on a GPU"};
  if (rows.empty() || rows.has(DType::f16)) throw Outside{"no gradient, or one of float16"};
  const double norm = rows.norm(Norm::squares, stages);
  // What unscaling, or a square of fp64, made infinite was not.
  const bool infinite = !std::isfinite(norm) && !std::isfinite(rows.norm(Norm::largest));
  return Py_BuildValue("(dN)", norm, PyBool_FromLong(infinite));
}

PyObject* scale(const Answers& answers, PyObject* const* args) {
  const double factor = as_number(args[1]);
  Call call(answers, kept<&fastopt::scale>());
  call.for_items(args[0], [&](PyObject* tensor) { call.rows().add_written(impl_of(tensor)); });
  if (call.rows().on_gpu()) throw Outside{"shards on a GPU"};
  if (factor != 1) call.rows().run<Scale>(factor);
  return call.done();
}

PyObject* scale_grads(const Answers& answers, PyObject* const* args) {
  const double factor = as_number(args[1]);
  Call call(answers, kept<&fastopt::scale_grads>());
  call.for_grads(args[0], [&](TensorImpl* grad) { call.rows().add_written(grad); });
  if (args[2] != Py_None) {
    const TensorImpl* norm = impl_of(args[2]);
    DType dtype;
    if (!call.rows().on_gpu() || !call.rows().is_on(norm->device())) throw Outside{"a norm on another device than the gradients"};
    if (!is_plain(norm) || norm->dim() || !dtype_of(norm, dtype) || itemsize(dtype) == 2) throw Outside{"a norm that is no number of float32 or float64"};
    if (dtype == DType::f64 && call.rows().has_small_scalars()) throw Outside{"a gradient without dimensions and a norm of another dtype"};
    return call.rows().for_gpu(answers, factor);
  }
  if (call.rows().on_gpu()) throw Outside{"a norm on another device than the gradients"};
  if (factor != 1) call.rows().run<Scale>(factor);
  return call.done();
}

PyObject* clip_grad_value(const Answers& answers, PyObject* const* args) {
  const double limit = as_number(args[1]);
  if (!(limit >= 0)) throw Outside{"a clip_value that is negative or NaN"};
  Call call(answers, kept<&fastopt::clip_grad_value>());
  call.for_grads(args[0], [&](TensorImpl* grad) { call.rows().add_written(grad); });
  for (int d = 0; d < dtype_count; d++)
    if (call.rows().has(DType(d)) && std::isinf(rounded_to(DType(d), limit)) && !std::isinf(limit)) throw Outside{"a clip_value that the gradients' dtype does not hold"};
  if (call.rows().on_gpu()) return call.rows().for_gpu(answers, limit);
  call.rows().run<Clamp>(limit);
  return call.done();
}

PyObject* average(const Answers& answers, PyObject* const* args) {
  const double number = as_number(args[2]);
  const bool is_count = is_true(args[3]);
  Call call(answers, kept<&fastopt::average>());
  Rows& rows = call.rows();
  if (!PyList_CheckExact(args[1]) && !PyTuple_CheckExact(args[1])) throw Outside{"no list of tensors"};
  Py_ssize_t at = 0;
  const Py_ssize_t values = PySequence_Fast_GET_SIZE(args[1]);
  call.for_items(args[0], [&](PyObject* one) {
    PyObject* value = at < values ? PySequence_Fast_GET_ITEM(args[1], at++) : nullptr;
    if (!value || !is_exact(value)) throw Outside{"a tensor is a subclass, or missing"};
    rows.add_pair(impl_of(one), impl_of(value));
  });
  if (at != values) throw Outside{"lists of different lengths"};
  // On a GPU torch makes the mean an average of a weight, the reciprocal of the count in fp32.
  if (rows.on_gpu()) return rows.for_gpu(answers, is_count ? double(1 / float(number)) : number);
  if (!is_count) rows.run<Average>(number);
  else if (rows.has(DType::bf16) || rows.has(DType::f16)) throw Outside{"a mean in 16 bits, which torch rounds at each operation"};
  else rows.run<Mean>(number);
  return call.done();
}

PyObject* zero_grad(const Answers& answers, PyObject* const* args) {
  if (is_watched()) throw Outside{"a profiler or an observer listens"};
  const bool set_to_none = is_true(args[1]);
  Call call(answers, kept<&fastopt::zero_grad>());
  const py::object groups = attribute(args[0], names::param_groups);
  if (!PyList_Check(groups.ptr())) throw Outside{"param_groups is no list"};
  std::vector<at::Tensor> held;
  // Dropping a gradient may run code of the user's, so nothing is borrowed across it.
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); g++) {
    const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), g));
    if (!is_dict(group.ptr())) throw Outside{"a param group is no dict"};
    const auto params = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(group.ptr(), names::params));
    if (!params || !PyList_CheckExact(params.ptr())) throw Outside{"a param group has no list of params"};
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); i++) {
      const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
      if (!is_exact(param.ptr()) && !(set_to_none && DTensors::is(param.ptr()))) throw Outside{"a parameter is a tensor subclass"};
      const at::Tensor& tensor = THPVariable_Unpack(param.ptr());
      const at::Tensor& grad = tensor.unsafeGetTensorImpl()->grad();
      if (!grad.defined()) continue;
      if (set_to_none) {
        const at::Tensor dropped = std::move(tensor.unsafeGetTensorImpl()->mutable_grad());
        continue;
      }
      if (grad.grad_fn()) throw Outside{"a gradient has a graph"};
      PyObject* wrapper = object_of(grad.unsafeGetTensorImpl());
      if (wrapper && !is_exact(wrapper)) throw Outside{"a gradient is a tensor subclass"};
      grad.unsafeGetTensorImpl()->set_requires_grad(false);
      if (!grad.unsafeGetTensorImpl()->is_non_overlapping_and_dense()) throw Outside{"a gradient is not dense"};
      held.push_back(grad);
      call.rows().add_written(grad.unsafeGetTensorImpl());
    }
  }
  call.rows().end();
  if (call.rows().on_gpu()) throw Outside{"gradients on a GPU are to be zero"};
  call.rows().zero();
  return call.done();
}

}  // namespace fastopt
