// The norm of gradients, from what a reading pass left of each tile to torch's coefficient.
#pragma once
#include <ATen/EmptyTensor.h>

#include <cmath>

#include "plan/python.h"
#include "step/isa.h"

namespace fastopt {

// Of all tiles together: the sum of magnitudes, the root of the sum of squares, or the largest magnitude. Added in their order.
template <class Numbers> double total(Norm norm, const Numbers& tiles) {
  double total = 0;
  for (const double number : tiles) total = norm == Norm::largest ? (total != total || total > number ? total : number) : total + number;
  return norm == Norm::squares ? std::sqrt(total) : total;
}

// Memory for a number. torch's own allocator aligns to cache lines, which takes malloc as long as the norm of a few scalars.
struct NumberAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = ::operator new(bytes);
    return {memory, memory, raw_deleter(), c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return [](void* memory) { ::operator delete(memory); }; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// A 0-dim tensor as torch's: fp64 if some gradient is, else fp32.
inline at::Tensor scalar_tensor(double value, bool f64) {
  static NumberAllocator allocator;
  at::Tensor made = at::detail::empty_generic({}, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), f64 ? at::kDouble : at::kFloat, std::nullopt);
  if (f64) *static_cast<double*>(made.mutable_data_ptr()) = value;
  else *static_cast<float*>(made.mutable_data_ptr()) = float(value);
  return made;
}

// max_norm / (norm + 1e-6), at most 1, as torch computes it with 0-dim tensors: a reciprocal and a product.
template <class T> double clip_coefficient(double max_norm, T norm) {
  const T coefficient = T(1) / (norm + T(1e-6)) * T(max_norm);
  return coefficient > 1 ? 1 : coefficient;
}
inline double clip_coefficient(double max_norm, double norm, bool f64) {
  return f64 ? clip_coefficient<double>(max_norm, norm) : clip_coefficient<float>(max_norm, float(norm));
}

[[noreturn]] inline void raise_nonfinite(double order) {
  raise(PyExc_RuntimeError, "The total norm of order " + py::cast<std::string>(py::repr(py::float_(order))) + " for gradients from `parameters` is non-finite, so it "
        "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`");
}

}  // namespace fastopt
