// What a step shall do beside torch's: fastopt/extras.py's Extras, as numbers, but for what kernels on a GPU alone read.
#pragma once
#include "plan/tensors.h"
#include "step/rows.h"

namespace fastopt {

constexpr unsigned draws_bit = 1u << max_state;   // a seed and a step count, for random bits; of 16-bit parameters, as companions are

struct Extras {
  bool clips = false, error_if_nonfinite = false, unscales = false, norm_known = false, averages = false, masters = false, draws = false;
  bool on_gpu = false;                            // whether the scale or the norm is a tensor on a GPU: no number then that is known here
  double max_norm = 0, inverse_scale = 1, norm = 0, ema_decay = 0;

  Extras() = default;
  // From the tuple, or null.
  explicit Extras(PyObject* tuple) {
    if (!tuple) return;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 9) raise(PyExc_TypeError, "step(optimizer, fresh, extras)");
    auto number = [&](Py_ssize_t at, double& value) {
      PyObject* item = PyTuple_GET_ITEM(tuple, at);
      if (item == Py_None) return false;
      if (is_exact(item) && impl_of(item)->device_type() == gpu_type) return on_gpu = true;
      value = PyFloat_AsDouble(item);
      if (value == -1 && PyErr_Occurred()) throw python_error();
      return true;
    };
    clips = number(0, max_norm), error_if_nonfinite = is_true(PyTuple_GET_ITEM(tuple, 1));
    unscales = number(2, inverse_scale), norm_known = number(3, norm), averages = number(4, ema_decay);
    masters = is_true(PyTuple_GET_ITEM(tuple, 5)), draws = is_true(PyTuple_GET_ITEM(tuple, 6));
  }
  // The state of a parameter that it calls for beside the algorithm's: a bit mask of state tensors and draws_bit.
  unsigned state() const { return (averages ? 1u << average_slot : 0u) | (masters ? 1u << companion_slot : 0u) | (draws ? draws_bit : 0u); }
  // Whether gradients are multiplied by a number.
  bool scales() const { return clips || unscales; }
};

}  // namespace fastopt
