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

// Calls f(begin, end) for shares of some work.
template <class F> void share(int64_t work, F f) {
  if (work <= grain) f(int64_t(0), work);
  else at::parallel_for(0, work, grain, f);
}

// The rows, each with its update; the same where rows share memory, one after the other; or the reading pass over them (see step/isa.h).
inline void share_rows(const Isa& isa, const Row* rows, const int64_t* ends, size_t count, const Stages& stages = {}) {
  share(ends[count - 1], [&](int64_t begin, int64_t end) { run(isa, rows, ends, count, begin, end, stages); });
}
inline void share_rows_in_turn(const Isa& isa, const Row* rows, size_t count, const Stages& stages = {}) {
  for (const Row* row = rows; row < rows + count; row++) {
    const int64_t end = row->numel + row_cost;
    share_rows(isa, row, &end, 1, stages);
  }
}
inline void share_reading(const Isa& isa, Norm norm, const Row* rows, const int64_t* ends, const size_t* firsts, size_t count, double* tiles,
                          const Stages& stages = {}) {
  share(ends[count - 1], [&](int64_t begin, int64_t end) { read(isa, norm, rows, ends, firsts, count, begin, end, tiles, stages); });
}

}  // namespace fastopt
