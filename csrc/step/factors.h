// A gradient multiplied by the factors of a step (Stages in rows.h), each time rounded to its dtype as if it were stored.
#pragma once
#include "operands.h"
#include "update.h"

namespace fastopt {
namespace {

template <class T, class P> inline void scale(const P* __restrict from, P* __restrict to, int64_t n, [[maybe_unused]] int64_t rest, T factor) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, float>) {
    if (factor != factor) factor = NAN;           // no bits that rounding could carry over
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      if (i + ahead / int64_t(sizeof(P)) < rest) fetch_ahead(from + i);
      Floats a, b;
      load<split<P, P>>(a, b, from + i);
      store<split<P, P>>(a * Floats(factor), b * Floats(factor), to + i);
    }
  }
#endif
  for (; i < n; i++) narrow(T(widen(from[i])) * factor, to[i]);
}

// n elements of a block, after all factors.
template <class P> inline void scale_all(const P* from, P* to, int64_t n, int64_t rest, const Stages& stages) {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  alignas(64) P once[block];
  scale(from, stages.factors == 1 ? to : once, n, rest, T(stages.factor[0]));
  if (stages.factors == 2) scale(once, to, n, n, T(stages.factor[1]));
}

// n elements of the gradient, at most a block, after all factors and in its own dtype; in memory `rest` elements, n or more, are to be read.
template <class S> void scale_gradient(const Row& row, int64_t at, int64_t n, int64_t rest, const Stages& stages, S* to) {
  alignas(64) S gathered[block];
  gather(row, 1, at, n, gathered);
  scale_all(in_order(row, 1, at, gathered), to, n, row.layout ? n : rest, stages);
}

// A row whose gradient's last factor is part of the sign, with which its scalars begin: for a gradient in the compute type, where an
// update multiplies by it anyway, and where a product with 1 or -1 rounds nothing.
class FactorInSign {
 public:
  FactorInSign(const Row& of, const Stages& all) : row(of), stages(all) {
    std::memcpy(&scalars, of.scalars, sizeof scalars);
    const double factor = stages.factor[--stages.factors];
    if (computes_in_f64(row.dtype[0])) multiply<double>(factor);
    else multiply<float>(factor);
    row.scalars = &scalars;
  }
  static bool fits(const Row& row, const Stages& stages) {
    return stages.factors && row.data[1] && row.dtype[1] == (computes_in_f64(row.dtype[0]) ? DType::f64 : DType::f32);
  }

  Row row;
  Stages stages;

 private:
  template <class T> void multiply(double factor) {
    T sign;
    std::memcpy(&sign, &scalars, sizeof sign);
    sign *= T(factor);
    std::memcpy(&scalars, &sign, sizeof sign);
  }
  AnyScalars scalars;
};

}  // namespace
}  // namespace fastopt
