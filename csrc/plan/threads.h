// Sharing work among torch's threads: from how much on, and how.
#pragma once
#include <ATen/Parallel.h>

#include "step/isa.h"

namespace fastopt {

inline const Isa* isa = best_isa();       // that runs all rows

constexpr int64_t grain = 16384;          // work below which a second thread costs more than it brings
constexpr int64_t params_grain = 256;     // the same for parameters to compare or to count
constexpr int64_t release_gil = 1 << 19;  // work from which other Python threads shall run meanwhile; about 0.1 ms

// Calls f(begin, end) for shares of `count` parameters, on all threads if the kernels, with this much work, will wake them anyway. The
// caller waits with the GIL, and f calls nothing of Python's.
template <class F> void share_params(int64_t work, size_t count, F f) {
  if (work <= grain) return f(size_t(0), count);
  at::parallel_for(0, int64_t(count), params_grain, [&](int64_t begin, int64_t end) { f(size_t(begin), size_t(end)); });
}

// The rows, each with its update; or the reading pass over them (see step/isa.h).
inline void share_rows(const Isa& isa, const Row* rows, const int64_t* ends, size_t count, const Stages& stages = {}) {
  const int64_t total = ends[count - 1];
  auto run_share = [&](int64_t begin, int64_t end) { run(isa, rows, ends, count, begin, end, stages); };
  if (total <= grain) run_share(0, total);
  else at::parallel_for(0, total, grain, run_share);
}
inline void share_reading(const Isa& isa, Norm norm, const Row* rows, const int64_t* ends, const size_t* firsts, size_t count, double* tiles,
                          const Stages& stages = {}) {
  const int64_t total = ends[count - 1];
  auto read_share = [&](int64_t begin, int64_t end) { read(isa, norm, rows, ends, firsts, count, begin, end, tiles, stages); };
  if (total <= grain) read_share(0, total);
  else at::parallel_for(0, total, grain, read_share);
}

}  // namespace fastopt
