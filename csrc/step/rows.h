// A row, which is the update of one tensor, and how the work of many rows is measured and cut into shares.
//
// plan/walk_param.cpp and plan/after_backward.cpp fill rows from live tensors; isa.h runs them. What a row needs of torch is not in it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace fastopt {

constexpr int max_slots = 3;                 // state tensors of an algorithm
constexpr int average_slot = max_slots;        // the running average of the parameter, which is no algorithm's
constexpr int companion_slot = max_slots + 1;  // what the parameter's 16 bits lack: see Row
constexpr int max_state = max_slots + 2;
constexpr int max_operands = 2 + max_state;  // param, grad, state
constexpr int max_scalars = 12;              // numbers of a step that an update reads
constexpr int max_numbers = 8;               // hyper-parameters that they come from

// Sizes and strides (in elements) of operands that do not all walk memory in the same order: made by layout.h.
struct Layout {
  int ndim;
  const int64_t* sizes;
  const int64_t* strides[max_operands];
};

// Room for the Scalars<T> of any algorithm.
struct alignas(16) AnyScalars { char bytes[max_scalars * sizeof(double)]; };

// What the random bits that round a parameter are a function of (philox.h).
struct Draws {
  uint64_t seed, step;
  uint32_t position;             // of the parameter in its optimizer
};

// The update of one tensor. A parameter of 16 bits may have a companion, both together being its master, an fp32 number: of bf16, the
// remainder, an integer of 16 bits (join() in round.h); of fp16, the master itself.
struct Row {
  void* data[max_operands];      // param, grad, state; null where there is none
  DType dtype[max_operands];     // of a remainder: bf16, which it is a part of
  uint8_t algorithm;             // position in Algorithms, or behind them in Passes
  uint8_t used;                  // bit mask of the algorithm's slots in use
  int64_t numel;
  const void* scalars;           // Scalars<T> of the algorithm; T is double for an fp64 parameter, else float
  const Layout* layout;          // null: element i of every operand is at data + i
  Draws draws;                   // if Stages says so
};

// What a step does to each row beside the update, while its elements are in the caches.
struct Stages {
  // What a gradient is multiplied by where it is loaded: one after the other, each time rounded to the gradient's dtype, as if it were
  // stored in between. In memory it stays as it is.
  int factors = 0;
  double factor[2] = {};
  // The weight of the parameter in its running average, which becomes torch.lerp of both.
  bool averages = false;
  double average_weight = 0;
  // Whether parameters of 16 bits are rounded with random bits.
  bool draws = false;
};

// Work is measured in elements, a row counting row_cost more: ends[r] is the work up to and including row r. The same
// function cuts a row for the thread that ends there and the one that begins there, at a multiple of some elements.
constexpr int64_t row_cost = 32;
constexpr int64_t line = 64;                 // elements: at least a cache line
constexpr int64_t tile = 4096;               // elements of which a reading pass leaves one number

inline int64_t cut(const Row& row, int64_t work, int64_t multiple) {
  int64_t element = (work - row_cost) / multiple * multiple;
  return element < 0 ? 0 : element < row.numel ? element : row.numel;
}
constexpr int64_t tiles_of(const Row& row) { return (row.numel + tile - 1) / tile; }

// Fetches the beginning of a row: where rows are short, the processor would see too late that there is another.
inline void prefetch(const Row& row) {
  for (const void* data : row.data)
    for (int64_t at = 0; data && at < 512; at += 64) __builtin_prefetch(static_cast<const char*>(data) + at);
}

}  // namespace fastopt
