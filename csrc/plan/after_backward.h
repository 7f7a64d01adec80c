// What surrounds a step, by lists of tensors and without an optimizer's plan: norms, clipping, averaging, zeroing.
//
// Each function checks all of its tensors before it writes one; but zero_grad, which can be repeated, as it goes. Those that are not for
// this library make it answer LeftToTorch(reason): torch's own function shall do it. Those of a GPU make it answer GpuPass:
// fastopt/gpu_passes.py does it. Nothing is kept of the tensors, only the memory of the rows.
#pragma once
#include "plan/answer.h"
#include "plan/tensors.h"
#include "step/isa.h"
#include "step/layout.h"
#include "step/overlap.h"

namespace fastopt {

// Rows of tensors on the CPU, or on one GPU, and passes over the former. Operand 0 is what a pass writes, operand 1 what it reads.
class Rows {
 public:
  void clear();
  bool empty() const { return rows.empty(); }
  bool any_empty() const { return empty_rows; }
  // Whether there is a tensor without dimensions and not of fp64: a product with another one that is, torch makes in fp64.
  bool has_small_scalars() const { return small_scalars; }
  bool has(DType dtype) const { return dtypes >> int(dtype) & 1; }

  bool on_gpu() const { return !rows.empty() && device.type() == gpu_type; }
  bool is_on(c10::Device other) const { return other == device; }
  // What fastopt/gpu_passes.py shall do: see PassImage::answer. Throws Outside.
  PyObject* for_gpu(const Answers& answers, double number, Norm norm = Norm::squares, double order = 0);

  // A tensor that is read, written, or both at once; or one that is written and another that is read. Throws Outside.
  void add_read(TensorImpl* t) { add(nullptr, t); }
  void add_written(TensorImpl* t) { add(t, nullptr); }
  void add_both(TensorImpl* t) { add(t, t); }
  void add_pair(TensorImpl* written, TensorImpl* read) { add(written, read); }

  // Of all tensors that are read, as one vector: the sum of magnitudes, the root of the sum of squares, or the largest magnitude.
  double norm(Norm norm, const Stages& stages = {});
  // Runs a pass, whose scalars are made from a number, over all rows.
  template <class Pass> void run(double number);
  void zero();

 private:
  void add(TensorImpl* written, TensorImpl* read);
  void point_rows();
  template <class F> void without_gil(F f);
  void run_rows(size_t pass, const AnyScalars (&scalars)[dtype_count]);

  Vec<Row> rows;
  Vec<int64_t> ends, layout_at;
  Vec<size_t> firsts;                             // of the tiles of each row
  Vec<double> numbers;                            // of the tiles
  Vec<TensorImpl*> written, read;
  Vec<c10::intrusive_ptr<TensorImpl>> held;       // and their memory, once the GIL was released
  Vec<c10::Storage> alive;
  Layouts layouts;
  Extents extents;
  c10::Device device = c10::kCPU;                 // of all
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
// zero_grad(optimizer, set_to_none) -> DONE | LeftToTorch
PyObject* zero_grad(const Answers& answers, PyObject* const* args);

}  // namespace fastopt
