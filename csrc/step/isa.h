// Running rows with one instruction set: the list of the compiled instances, and a share of the work.
//
// isa*.cpp compile apply.h once each; plan/plan.cpp splits the work over torch's threads.
#pragma once
#include "rows.h"

namespace fastopt {

// A compiled instance of the machinery.
struct Isa {
  const char* name;
  bool (*supported)();
  void (*apply)(const Row& row, int64_t begin, int64_t end);  // elements [begin, end) of a row
};

extern const Isa isas[];         // the best last
extern const int isa_count;
inline const Isa* best_isa() {
  for (int i = isa_count - 1; i > 0; i--)
    if (isas[i].supported()) return &isas[i];
  return isas;
}

// The part of the rows that lies in [begin, end) of their work.
inline void run(const Isa& isa, const Row* rows, const int64_t* ends, size_t count, int64_t begin, int64_t end) {
  size_t lo = 0, hi = count;     // the first row that reaches beyond begin
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (ends[mid] > begin) hi = mid; else lo = mid + 1;
  }
  for (size_t r = lo; r < count; r++) {
    int64_t start = r ? ends[r - 1] : 0;
    if (start >= end) break;
    int64_t from = begin > start ? cut(rows[r], begin - start) : 0;
    int64_t upto = end < ends[r] ? cut(rows[r], end - start) : rows[r].numel;
    if (r + 1 < count) prefetch(rows[r + 1]);
    if (from < upto) isa.apply(rows[r], from, upto);
  }
}

}  // namespace fastopt
