// The traffic of one optimizer step with trivial arithmetic: what memory alone allows. bench/roof.py builds and calls it.
//
// It reads every operand and writes those that a step writes, on the tensors of an optimizer that is being measured, so that
// placement and caches are the same; operands may differ in the size of their elements. `zero` is 0 at run time, which the
// compiler cannot know: every value is loaded, combined and stored, and none changes. Threads share the work as the library's
// do: one region, equal contiguous parts cut on cache lines.
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t line = 64, block = 512;  // elements

// 16 bits at a time, whatever an element has.
inline void read(const uint16_t* data, int64_t n, uint16_t& seen) {
  uint16_t bits = 0;
  for (int64_t i = 0; i < n; i++) bits |= data[i];
  seen |= bits;
}
inline void write(uint16_t* data, int64_t n, uint16_t change) {
  for (int64_t i = 0; i < n; i++) data[i] ^= change;
}

void touch(const int64_t* row, const int64_t* itemsizes, const int64_t* written, int64_t operands, int64_t begin, int64_t end, uint16_t zero) {
  for (int64_t at = begin; at < end; at += block) {
    uint16_t seen = 1;
    for (bool writes : {false, true})
      for (int64_t k = 0; k < operands; k++) {
        if (bool(written[k]) != writes) continue;
        auto* data = reinterpret_cast<uint16_t*>(row[k] + at * itemsizes[k]);
        const int64_t n = std::min(block, end - at) * itemsizes[k] / 2;
        if (writes) write(data, n, seen & zero); else read(data, n, seen);
      }
  }
}

}  // namespace

// rows: `operands` addresses each; itemsizes and written: of the operands; ends: elements up to and with that row.
extern "C" void roof(const int64_t* rows, const int64_t* ends, int64_t count, const int64_t* itemsizes, const int64_t* written,
                     int64_t operands, int64_t threads, int64_t zero) {
  const int64_t total = count ? ends[count - 1] : 0;
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; t++) {
    const int64_t begin = total * t / threads, end = total * (t + 1) / threads;
    for (int64_t r = std::upper_bound(ends, ends + count, begin) - ends; r < count; r++) {
      const int64_t start = r ? ends[r - 1] : 0;
      if (start >= end) break;
      const int64_t from = std::max(begin - start, int64_t(0)) / line * line;
      const int64_t upto = end < ends[r] ? (end - start) / line * line : ends[r] - start;
      if (from < upto) touch(rows + operands * r, itemsizes, written, operands, from, upto, uint16_t(zero));
    }
  }
}
