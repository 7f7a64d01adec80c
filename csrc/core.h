// The CPU step without torch: what a row of work is, and running many rows with one instruction set on a share of the work.
//
// bind.cpp fills the rows from live tensors and splits the work over torch's threads; isa.cpp compiles apply.h once per ISA.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastopt {

constexpr int max_slots = 3;                 // state tensors of an optimizer
constexpr int max_operands = 2 + max_slots;  // param, grad, state slots
constexpr int max_scalars = 12;

enum class DType : uint8_t { f32, f64, bf16, f16 };
constexpr int64_t itemsize(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Sizes and per-operand strides (in elements) of a tensor whose operands do not all walk memory in the same order.
struct Layout {
  int ndim;
  const int64_t* sizes;
  const int64_t* strides[max_operands];
};

// The update of one tensor.
struct Row {
  void* data[max_operands];      // param, grad, state slots; null where the slot is not used
  DType dtype[max_operands];
  uint8_t optimizer;             // position in Optimizers
  uint8_t used;                  // bit mask of the state slots in use
  int64_t numel;
  const void* scalars;           // Optimizer::Scalars<T>; T is double for an fp64 parameter, else float
  const Layout* layout;          // null: element i of every operand is at data + i
};

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

// Work is measured in elements, a row counting row_cost more: ends[r] is the work up to and including row r. The same
// function cuts a row for the thread that ends there and the one that begins there, on a cache line.
constexpr int64_t row_cost = 32;
constexpr int64_t line = 64;

inline int64_t cut(const Row& row, int64_t work) {
  int64_t element = (work - row_cost) / line * line;
  return element < 0 ? 0 : element < row.numel ? element : row.numel;
}

// Fetches the beginning of a row: where rows are short, the processor would see too late that there is another.
inline void prefetch(const Row& row) {
  for (const void* data : row.data)
    for (int64_t at = 0; data && at < 512; at += 64) __builtin_prefetch(static_cast<const char*>(data) + at);
}

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
