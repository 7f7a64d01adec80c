// The algorithms: for each, the hyper-parameters it reads, the scalars of a step and the update of one element.
//
// Nothing here knows of pointers, threads, dtypes in memory or torch. kernels/*.py holds the same updates in Triton, statement by
// statement; docs/numerics.md says where torch rounds and where it fuses, and why the order of operations must not change.
//
// An algorithm is a struct with
//   name, has_step      as the Python class names it; whether its state counts steps
//   keys                the entries of a param group that it reads: a number each, unless said otherwise
//   slots               its state tensors; used(g) is the bit mask of those that the options of a group call for, required of
//                       those that all do
//   Hyper<N>            the numbers behind keys, in that order. N is double, or a type that computes on 0-dim tensors
//   Scalars<T>          what the update of one tensor needs to know of (group, step count t), each computed as torch does on the
//                       host in double and rounded once to the compute type T. Without step count, t is 1 at the first step.
//                       Begins with the sign that the gradient is multiplied by first, 1 or -1
//   update<used>        one element, in the compute type: fp32, or fp64 for fp64 parameters
#pragma once
#include <cmath>
#include <cstddef>
#include <tuple>
#include <type_traits>

namespace fastopt {

enum Kind { number, pair, truth };  // truth: 1 if Python takes the value for true, else 0
struct Key {
  const char* name;
  Kind kind = number;
};

namespace {  // code built for one ISA must never be shared with another

// float and double, by builtins
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float sqrt(float a) { return __builtin_sqrtf(a); }
inline double sqrt(double a) { return __builtin_sqrt(a); }
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }  // b where either is NaN
template <class V> inline V select(bool condition, V a, V b) { return condition ? a : b; }
template <class V> inline V maximum(V a, V b) { return select(a != a, a, larger(a, b)); }  // NaN wins

// A divisor known beforehand. In fp32 a root is divided by it with multiplications, several times as fast as the processor's division,
// which is what an update would wait for. The result is the same: `near` is within one unit in the last place of the quotient and
// `reciprocal` is rounded to nearest, so the correction rounds as division does (Markstein, IBM J. Res. Dev. 34, 1990).
template <class T> struct Divisor {
  T value, reciprocal, rest;     // reciprocal + rest = 1 / value; reciprocal is 0 where that could overflow or lose bits
  Divisor& operator=(double number) {
    value = T(number);
    const bool moderate = value > T(0x1p-30) && value <= T(1);
    reciprocal = moderate ? T(1 / double(value)) : T(0);
    rest = moderate ? T(1 / double(value) - double(reciprocal)) : T(0);
    return *this;
  }
};
template <class V, class T> inline V divide_root(V root, const Divisor<T>& by) {
  if constexpr (std::is_same_v<T, double>) return root / by.value;
  V near = fma(root, by.reciprocal, root * by.rest);
  V quotient = fma(fma(-near, by.value, root), by.reciprocal, near);
  quotient = larger(quotient, root);  // zero, infinity and NaN stay what they are
  if (by.reciprocal == 0) quotient = root / by.value;
  return quotient;
}

// The hyper-parameter as a number of the compute type: a 0-dim tensor is cast before more arithmetic is done on it.
template <class T> inline double to(double value) { return value; }

// torch.lerp(a, b, w) = fma(weight, b - a, from_end ? b : a), which torch evaluates from the nearer end.
template <class T> inline T lerp_weight(T w) { return w < T(0.5) && w > T(-0.5) ? w : w - T(1); }
template <class T> inline T lerp_from_end(T w) { return w < T(0.5) && w > T(-0.5) ? T(0) : T(1); }

struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr bool has_step = false;
  static constexpr Key keys[] = {{"lr"}, {"momentum"}, {"dampening"}, {"weight_decay"}, {"nesterov", truth}, {"maximize", truth}};
  static constexpr const char* slots[] = {"momentum_buffer"};
  enum { momentum_buffer };
  static constexpr unsigned required = 0;

  template <class N> struct Hyper { N lr, momentum, dampening, weight_decay, nesterov, maximize; };

  static unsigned used(const Hyper<double>& g) { return required | (g.momentum != 0 ? 1u << momentum_buffer : 0u); }

  template <class T> struct Scalars {
    T sign, weight_decay, momentum, grad_weight, nesterov, neg_lr;
    template <class N> Scalars(const Hyper<N>& g, double t)
        : sign(double(g.maximize) ? -1 : 1), weight_decay(double(g.weight_decay)), momentum(double(g.momentum)),
          grad_weight(t == 1 ? 1 : double(1 - g.dampening)),  // the first step has no dampening; the buffer starts as -0.0
          nesterov(double(g.nesterov) ? 1 : 0), neg_lr(double(-g.lr)) {}
  };

  template <unsigned used, class V, class T> static inline void update(V& param, V grad, V* state, const Scalars<T>& h) {
    grad = h.sign * grad;
    grad = h.weight_decay != 0 ? fma(h.weight_decay, param, grad) : grad;
    if constexpr (used & 1u << momentum_buffer) {
      V& buf = state[momentum_buffer];
      buf = fma(h.grad_weight, grad, buf * h.momentum);
      grad = h.nesterov != 0 ? fma(h.momentum, buf, grad) : buf;
    }
    param = fma(h.neg_lr, grad, param);
  }
};

struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr bool has_step = true;
  static constexpr Key keys[] = {{"lr"}, {"lr_decay"}, {"weight_decay"}, {"eps"}, {"maximize", truth}};
  static constexpr const char* slots[] = {"sum"};
  enum { sum };
  static constexpr unsigned required = 1u << sum;

  template <class N> struct Hyper { N lr, lr_decay, weight_decay, eps, maximize; };

  static unsigned used(const Hyper<double>&) { return required; }

  template <class T> struct Scalars {
    T sign, weight_decay, eps, neg_clr;
    template <class N> Scalars(const Hyper<N>& g, double t)
        : sign(double(g.maximize) ? -1 : 1), weight_decay(double(g.weight_decay)), eps(double(g.eps)),
          neg_clr(double(-(g.lr / (1 + (t - 1) * g.lr_decay)))) {}
  };

  template <unsigned used, class V, class T> static inline void update(V& param, V grad, V* state, const Scalars<T>& h) {
    grad = h.sign * grad;
    grad = h.weight_decay != 0 ? fma(h.weight_decay, param, grad) : grad;
    state[sum] = fma(grad, grad, state[sum]);
    V denom = sqrt(state[sum]) + h.eps;
    param = param + (h.neg_clr * grad) / denom;
  }
};

struct RMSprop {
  static constexpr const char* name = "rmsprop";
  static constexpr bool has_step = true;
  static constexpr Key keys[] = {{"lr"}, {"alpha"}, {"eps"}, {"weight_decay"}, {"momentum"}, {"centered", truth}, {"maximize", truth}};
  static constexpr const char* slots[] = {"square_avg", "momentum_buffer", "grad_avg"};
  enum { square_avg, momentum_buffer, grad_avg };
  static constexpr unsigned required = 1u << square_avg;

  template <class N> struct Hyper { N lr, alpha, eps, weight_decay, momentum, centered, maximize; };

  static unsigned used(const Hyper<double>& g) {
    return required | (g.momentum > 0 ? 1u << momentum_buffer : 0u) | (g.centered ? 1u << grad_avg : 0u);
  }

  template <class T> struct Scalars {
    T sign, weight_decay, alpha, one_minus_alpha, lerp_weight, lerp_from_grad, eps, momentum, neg_lr;
    template <class N> Scalars(const Hyper<N>& g, double)
        : sign(double(g.maximize) ? -1 : 1), weight_decay(double(g.weight_decay)), alpha(double(g.alpha)),
          one_minus_alpha(double(1 - g.alpha)), lerp_weight(fastopt::lerp_weight(one_minus_alpha)),
          lerp_from_grad(lerp_from_end(one_minus_alpha)), eps(double(g.eps)), momentum(double(g.momentum)),
          neg_lr(double(-g.lr)) {}
  };

  template <unsigned used, class V, class T> static inline void update(V& param, V grad, V* state, const Scalars<T>& h) {
    grad = h.sign * grad;
    grad = h.weight_decay != 0 ? fma(h.weight_decay, param, grad) : grad;
    V& square = state[square_avg];
    square = fma(h.one_minus_alpha * grad, grad, square * h.alpha);
    V u = square;
    if constexpr (used & 1u << grad_avg) {
      V& avg = state[grad_avg];
      avg = fma(h.lerp_weight, grad - avg, select(h.lerp_from_grad != 0, grad, avg));
      u = fma(-avg, avg, square);
    }
    V denom = sqrt(u) + h.eps;
    if constexpr (used & 1u << momentum_buffer) {
      V& buf = state[momentum_buffer];
      buf = buf * h.momentum + grad / denom;
      param = fma(h.neg_lr, buf, param);
    } else {
      param = param + (h.neg_lr * grad) / denom;
    }
  }
};

struct Adam {
  static constexpr const char* name = "adam";
  static constexpr bool has_step = true;
  static constexpr Key keys[] = {{"lr"}, {"betas", pair}, {"eps"}, {"weight_decay"}, {"amsgrad", truth}, {"maximize", truth},
                                 {"decoupled_weight_decay", truth}};
  static constexpr const char* slots[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  enum { exp_avg, exp_avg_sq, max_exp_avg_sq };
  static constexpr unsigned required = 1u << exp_avg | 1u << exp_avg_sq;

  template <class N> struct Hyper { N lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay; };

  static unsigned used(const Hyper<double>& g) {
    return required | (g.amsgrad ? 1u << max_exp_avg_sq : 0u);
  }

  template <class T> struct Scalars {
    T sign, weight_decay, decay, lerp_weight, lerp_from_grad, beta2, one_minus_beta2;
    Divisor<T> bias_correction2_sqrt;
    T eps, neg_step_size;
    template <class N> Scalars(const Hyper<N>& g, double t) {
      using std::pow;
      N bias_correction1 = 1 - pow(g.beta1, t);
      N bias_correction2 = 1 - pow(g.beta2, t);
      N step_size = g.lr / bias_correction1;
      bool decoupled = double(g.decoupled_weight_decay) != 0 && double(g.weight_decay) != 0;
      T one_minus_beta1 = T(double(1 - to<T>(g.beta1)));
      sign = double(g.maximize) ? -1 : 1;
      weight_decay = T(double(g.decoupled_weight_decay) ? 0 : double(g.weight_decay));
      decay = T(decoupled ? double(1 - g.lr * g.weight_decay) : 1);
      lerp_weight = fastopt::lerp_weight(one_minus_beta1);
      lerp_from_grad = lerp_from_end(one_minus_beta1);
      beta2 = T(double(g.beta2));
      one_minus_beta2 = T(double(1 - g.beta2));
      bias_correction2_sqrt = double(pow(bias_correction2, 0.5));
      eps = T(double(g.eps));
      neg_step_size = T(double(-step_size));
    }
  };

  template <unsigned used, class V, class T> static inline void update(V& param, V grad, V* state, const Scalars<T>& h) {
    grad = h.sign * grad;
    grad = h.weight_decay != 0 ? fma(h.weight_decay, param, grad) : grad;
    param = param * h.decay;
    V &m = state[exp_avg], &v = state[exp_avg_sq];
    m = fma(h.lerp_weight, grad - m, select(h.lerp_from_grad != 0, grad, m));
    v = fma(h.one_minus_beta2 * grad, grad, v * h.beta2);
    V u = v;
    if constexpr (used & 1u << max_exp_avg_sq) u = state[max_exp_avg_sq] = maximum(state[max_exp_avg_sq], v);
    V denom = divide_root(sqrt(u), h.bias_correction2_sqrt) + h.eps;
    param = param + (h.neg_step_size * m) / denom;
  }
};

using Algorithms = std::tuple<SGD, Adagrad, RMSprop, Adam>;

template <class... Of> constexpr bool begin_with_sign(std::tuple<Of...>*) {
  return (!(offsetof(typename Of::template Scalars<float>, sign) || offsetof(typename Of::template Scalars<double>, sign)) && ...);
}
static_assert(begin_with_sign(static_cast<Algorithms*>(nullptr)), "factors.h looks for the sign there");

}  // namespace
}  // namespace fastopt
