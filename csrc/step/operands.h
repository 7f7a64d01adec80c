// An operand of a row in memory, whatever its dtype and strides: n elements of it, loaded as numbers and stored again.
#pragma once
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "round.h"
#if defined(FASTOPT_VECTOR_BYTES)
#include "simd.h"
#endif

namespace fastopt {
namespace {

constexpr int64_t block = 512;                    // elements that are worked on at a time, in the L1 cache

// ---- load and store of n elements, stride apart

template <class T, class S> inline void load(T* __restrict to, const S* __restrict from, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; i++) to[i] = T(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = T(widen(from[i * stride]));
  }
}
template <class T, class S> inline void store(const T* __restrict from, S* __restrict to, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i * stride]);
  }
}
#if defined(FASTOPT_VECTOR_BYTES)
template <> inline void load(float* __restrict to, const float16* __restrict from, int64_t n, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= n; i += lanes) write(from_half(read<Halves>(from + i)), to + i);
  for (; i < n; i++) to[i] = widen(from[i * stride]);
}
template <> inline void store(const float* __restrict from, float16* __restrict to, int64_t n, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= n; i += lanes) write(to_half(read<Vector>(from + i)), to + i);
  for (; i < n; i++) narrow(from[i], to[i * stride]);
}
#endif

// Calls f(memory, position in the block, n, stride) for the runs of elements [begin, begin + n) of an operand.
template <class S, class F>
inline void for_runs(S* data, const Layout* layout, int operand, int64_t begin, int64_t n, F f) {
  if (!layout) return f(data + begin, 0, n, 1);
  const int64_t *sizes = layout->sizes, *strides = layout->strides[operand];
  const int inner = layout->ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = begin + done, offset = 0, first = rest % sizes[inner];
    rest /= sizes[inner];
    for (int d = inner - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * strides[d];
    int64_t run = sizes[inner] - first < n - done ? sizes[inner] - first : n - done;
    f(data + offset + first * strides[inner], done, run, strides[inner]);
    done += run;
  }
}

template <class T> constexpr DType held_as = DType::f32;
template <> constexpr DType held_as<double> = DType::f64;
template <> constexpr DType held_as<bfloat16> = DType::bf16;
template <> constexpr DType held_as<float16> = DType::f16;
template <class F> inline void with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(data));
    case DType::f64: return f(static_cast<double*>(data));
    case DType::bf16: return f(static_cast<bfloat16*>(data));
    case DType::f16: return f(static_cast<float16*>(data));
  }
}

// ---- elements [at, at + n) of an operand of a row

// One after the other: where they lie, or in a block.
template <class S> S* in_order(const Row& row, int k, int64_t at, S* block) { return row.layout ? block : static_cast<S*>(row.data[k]) + at; }
template <class S> void gather(const Row& row, int k, int64_t at, int64_t n, S* to) {
  if (!row.layout) return;
  for_runs(static_cast<const S*>(row.data[k]), row.layout, k, at, n, [&](const S* from, int64_t i, int64_t run, int64_t stride) {
    for (int64_t j = 0; j < run; j++) to[i + j] = from[j * stride];
  });
}
template <class S> void scatter(const S* from, const Row& row, int k, int64_t at, int64_t n) {
  if (!row.layout) return;
  for_runs(static_cast<S*>(row.data[k]), row.layout, k, at, n, [&](S* to, int64_t i, int64_t run, int64_t stride) {
    for (int64_t j = 0; j < run; j++) to[j * stride] = from[i + j];
  });
}

template <class T> void load_operand(const Row& row, int k, int64_t at, int64_t n, T* to) {
  with_type(row.dtype[k], row.data[k], [&](auto* memory) {
    for_runs(memory, row.layout, k, at, n, [&](auto* from, int64_t i, int64_t run, int64_t stride) { load(to + i, from, run, stride); });
  });
}
template <class T> void store_operand(const T* from, const Row& row, int k, int64_t at, int64_t n) {
  with_type(row.dtype[k], row.data[k], [&](auto* memory) {
    for_runs(memory, row.layout, k, at, n, [&](auto* to, int64_t i, int64_t run, int64_t stride) { store(from + i, to, run, stride); });
  });
}

}  // namespace
}  // namespace fastopt
