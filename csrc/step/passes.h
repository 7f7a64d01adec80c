// Passes over tensors that are no optimizer's update, in the form of one (see algorithms.h): what surrounds a step.
//
// A pass has no state. Param is the tensor that it writes; one that is NoGrad reads nothing else.
#pragma once
#include <tuple>

#include "algorithms.h"

namespace fastopt {
namespace {

struct NoGrad {};

// param * factor, as torch.Tensor.mul_ does it with a 0-dim tensor.
struct Scale : NoGrad {
  template <class T> struct Scalars { T factor; };
  template <unsigned, class V, class T> static inline void update(V& param, V, V*, const Scalars<T>& h) { param = param * h.factor; }
};

// param between -limit and limit, NaN as it is.
struct Clamp : NoGrad {
  template <class T> struct Scalars { T limit; };
  template <unsigned, class V, class T> static inline void update(V& param, V, V*, const Scalars<T>& h) {
    param = select(param < V(-h.limit), V(-h.limit), param);
    param = select(V(h.limit) < param, V(h.limit), param);
  }
};

// torch.lerp of param, a running average, and grad, the present value.
struct Average {
  template <class T> struct Scalars {
    T weight, from_grad;
    explicit Scalars(double w) : weight(lerp_weight(T(w))), from_grad(lerp_from_end(T(w))) {}
  };
  template <unsigned, class V, class T> static inline void update(V& param, V grad, V*, const Scalars<T>& h) {
    param = fma(h.weight, grad - param, select(h.from_grad != 0, grad, param));
  }
};

// The mean of count values, of which param is that of the others, and grad the last.
struct Mean {
  template <class T> struct Scalars { T count; };
  template <unsigned, class V, class T> static inline void update(V& param, V grad, V*, const Scalars<T>& h) {
    param = param + (grad - param) / h.count;
  }
};

using Passes = std::tuple<Scale, Clamp, Average, Mean>;

// A pass's `algorithm` of a row.
template <class Pass, class... Of> constexpr size_t place_of(std::tuple<Of...>*) {
  size_t place = 0;
  (void)((std::is_same_v<Pass, Of> ? false : (place++, true)) && ...);
  return place;
}
template <class Pass> constexpr size_t pass_at = std::tuple_size_v<Algorithms> + place_of<Pass>(static_cast<Passes*>(nullptr));

}  // namespace
}  // namespace fastopt
