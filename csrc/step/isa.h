// Running rows with one instruction set: the list of the compiled instances, and a share of the work.
//
// isa*.cpp compile apply.h once each; plan/threads.h splits the work over torch's threads.
#pragma once
#include "rows.h"

namespace fastopt {

// What a reading pass leaves of each tile: the sum of the magnitudes, the sum of the squares, or the largest magnitude (NaN if one is).
enum class Norm : uint8_t { sum, squares, largest };

// A compiled instance of the machinery.
struct Isa {
  const char* name;
  bool (*supported)();
  void (*apply)(const Row& row, const Stages& stages, int64_t begin, int64_t end);  // elements [begin, end) of a row
  // Of its gradient, begin at a tile: one number each.
  void (*reduce)(const Row& row, Norm norm, const Stages& stages, int64_t begin, int64_t end, double* tiles);
};

// All that the plan knows of isa*.cpp: a wheel for many versions of torch has them in a library of their own.
extern __attribute__((visibility("default"))) const Isa isas[];   // the best last
extern __attribute__((visibility("default"))) const int isa_count;
inline const Isa* best_isa() {
  for (int i = isa_count - 1; i > 0; i--)
    if (isas[i].supported()) return &isas[i];
  return isas;
}

// Calls f(row, from, upto) for the parts of the rows that lie in [begin, end) of their work, cut at multiples of some elements.
template <class F> void for_share(const Row* rows, const int64_t* ends, size_t count, int64_t begin, int64_t end, int64_t multiple, F f) {
  size_t lo = 0, hi = count;     // the first row that reaches beyond begin
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (ends[mid] > begin) hi = mid; else lo = mid + 1;
  }
  for (size_t r = lo; r < count; r++) {
    int64_t start = r ? ends[r - 1] : 0;
    if (start >= end) break;
    int64_t from = begin > start ? cut(rows[r], begin - start, multiple) : 0;
    int64_t upto = end < ends[r] ? cut(rows[r], end - start, multiple) : rows[r].numel;
    if (r + 1 < count) prefetch(rows[r + 1]);
    if (from < upto) f(r, from, upto);
  }
}

inline void run(const Isa& isa, const Row* rows, const int64_t* ends, size_t count, int64_t begin, int64_t end, const Stages& stages = {}) {
  for_share(rows, ends, count, begin, end, line, [&](size_t r, int64_t from, int64_t upto) { isa.apply(rows[r], stages, from, upto); });
}

// The reading pass: the tiles of row r are written from tiles[firsts[r]] on.
inline void read(const Isa& isa, Norm norm, const Row* rows, const int64_t* ends, const size_t* firsts, size_t count, int64_t begin, int64_t end,
                 double* tiles, const Stages& stages = {}) {
  for_share(rows, ends, count, begin, end, tile,
            [&](size_t r, int64_t from, int64_t upto) { isa.reduce(rows[r], norm, stages, from, upto, tiles + firsts[r] + from / tile); });
}

}  // namespace fastopt
