// What surrounds a step, by lists of tensors and without an optimizer's plan: norms, clipping, averaging, zeroing.
//
// Each function checks all of its tensors before it writes one; but zero_grad, which can be repeated, as it goes. Those that are not for
// this library make it answer LeftToTorch(reason): torch's own function shall do it. Those of a GPU make it answer GpuPass:
// fastopt/gpu_passes.py does it. Of the tensors nothing is held from call to call, but each function keeps the rows that it made.
#pragma once
#include <ATen/record_function.h>

#include "plan/answer.h"
#include "plan/tensors.h"
#include "step/isa.h"
#include "step/layout.h"
#include "step/overlap.h"

namespace fastopt {

// Rows of tensors on the CPU, or on one GPU, and passes over the former. Operand 0 is what a pass writes, operand 1 what it reads.
//
// The tensors of a call are compared with the rows of the call before: most often they are the same. That takes less than to make the
// rows, and memory that is not written stays in the caches of the other cores, which read it.
class Rows {
 public:
  void begin();
  // A tensor that is read, written, or both at once; or one that is written and another that is read. Throws Outside.
  void add_read(TensorImpl* t) { add(nullptr, t); }
  void add_written(TensorImpl* t) { add(t, nullptr); }
  void add_both(TensorImpl* t) { add(t, t); }
  void add_pair(TensorImpl* written, TensorImpl* read) { add(written, read); }
  void end();
  void release();                                 // what must not outlive the call

  bool empty() const { return rows.empty(); }
  bool any_empty() const { return empty_rows; }
  // Whether there is a tensor without dimensions and not of fp64: a product with another one that is, torch makes in fp64.
  bool has_small_scalars() const { return small_scalars; }
  bool has(DType dtype) const { return dtypes >> int(dtype) & 1; }

  bool on_gpu() const { return !rows.empty() && device.type() == gpu_type; }
  bool is_on(c10::Device other) const { return other == device; }
  // What fastopt/gpu_passes.py shall do: see PassImage::answer. Throws Outside.
  PyObject* for_gpu(const Answers& answers, double number, Norm norm = Norm::squares, double order = 0);

  // Of all tensors that are read, as one vector: the sum of magnitudes, the root of the sum of squares, or the largest magnitude.
  double norm(Norm norm, const Stages& stages = {});
  // Runs a pass, whose scalars are made from a number, over all rows.
  template <class Pass> void run(double number);
  void zero();

 private:
  // What a row was made of.
  struct Made {
    TensorImpl *written, *read;                   // of this call; equal if it is both, null if there is none
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    int64_t layout;                               // place in `layouts`; -1 if there is none
  };
  void add(TensorImpl* written, TensorImpl* read);
  bool is_as_before(Row& row, const Made& made, TensorImpl* written, TensorImpl* read);
  void make_row(TensorImpl* written, TensorImpl* read);
  void drop_from(size_t row);
  bool overlap();
  void bump_versions();
  template <class F> void without_gil(F f);
  void run_rows(size_t pass);

  Vec<Row> rows;
  Vec<Made> made;                                 // one for one, like the next two
  Vec<int64_t> ends;
  Vec<size_t> firsts;                             // of the tiles of each row
  Vec<double> numbers;                            // of the tiles
  AnyScalars scalars[dtype_count];
  Vec<c10::intrusive_ptr<TensorImpl>> held;       // and their memory, once the GIL was released
  Vec<c10::Storage> alive;
  Layouts layouts;                                // rows with one are made anew at each call
  Extents extents;
  c10::Device device = c10::kCPU;                 // of all
  size_t count = 0;                               // of the tensors of this call so far
  bool moved = true, overlapping = false;         // whether memory has changed since it was known whether it overlaps
  int64_t work = 0;
  size_t tiles = 0;
  unsigned dtypes = 0;
  bool empty_rows = false, small_scalars = false;
};

// clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite) -> Tensor | GpuPass | LeftToTorch
PyObject* clip_grad_norm(const Answers& answers, PyObject* const* args);
// total_norm(tensors, norm_type, error_if_nonfinite) -> Tensor | GpuPass | LeftToTorch
PyObject* total_norm(const Answers& answers, PyObject* const* args);
// norm(tensors, norm_type) -> float | LeftToTorch: what total_norm rounds; of tensors of the CPU that are not empty
PyObject* norm(const Answers& answers, PyObject* const* args);
// search(parameters, inverse_scale) -> (norm of the unscaled gradients, whether one of the gradients is infinite or NaN) | LeftToTorch
PyObject* search(const Answers& answers, PyObject* const* args);
// scale_(tensors, factor) -> DONE | LeftToTorch
PyObject* scale(const Answers& answers, PyObject* const* args);
// scale_grads_(parameters, factor, None) -> DONE | LeftToTorch, or scale_grads_(parameters, max_norm, norm on a GPU) -> GpuPass | LeftToTorch
PyObject* scale_grads(const Answers& answers, PyObject* const* args);
// clip_grad_value_(parameters, clip_value) -> DONE | GpuPass | LeftToTorch
PyObject* clip_grad_value(const Answers& answers, PyObject* const* args);
// average_(averages, values, weight, False), or average_(averages, values, count, True) -> DONE | GpuPass | LeftToTorch
PyObject* average(const Answers& answers, PyObject* const* args);
// Whether a profiler or an observer of torch wants to know of a range of the user's.
inline bool is_watched() { return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value(); }

// zero_grad(optimizer, set_to_none) -> DONE | LeftToTorch
PyObject* zero_grad(const Answers& answers, PyObject* const* args);

}  // namespace fastopt
