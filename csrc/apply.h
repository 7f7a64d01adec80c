// The machinery of the CPU step, compiled once per ISA: an update over the elements of a row, whatever their dtypes and strides.
//
// Where all operands walk memory in one order and are fp32, fp64 or bf16 in a usual combination, the update runs on memory itself. Else
// it runs on blocks in the L1 cache: operands are loaded (widened, gathered), updated, and param and state stored (rounded, scattered).
// Everything has internal linkage: code for one ISA must never be shared with another.
#pragma once
#include <cstring>
#include <utility>

#include "core.h"
#include "optimizers.h"

namespace fastopt {
namespace {

constexpr int64_t block = 512;

// ---- bf16 and fp16 in memory, converted by integer arithmetic (round to nearest even), whatever the denormal mode

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

template <class T> inline T widen(T value) { return value; }
inline float widen(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float widen(float16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  uint32_t normal = (exponent + 112) << 23 | mantissa << 13;
  uint32_t special = 0x7f800000 | mantissa << 13;
  uint32_t subnormal = bits_of(float(int32_t(mantissa)) * 0x1p-24f);
  return float_of(sign | (exponent == 0 ? subnormal : exponent == 31 ? special : normal));
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(double value, float& out) { out = float(value); }
inline void narrow(float value, bfloat16& out) {
  uint32_t bits = bits_of(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(value != value ? 0x7fc0 : rounded);
}
inline void narrow(float value, float16& out) {
  uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the addition rounds to a multiple of 2^-24
  uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  out.bits = uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : finite));
}
inline void narrow(double value, bfloat16& out) { narrow(float(value), out); }
inline void narrow(double value, float16& out) { narrow(float(value), out); }

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
#if defined(FASTOPT_F16C)
template <> inline void load(float* __restrict to, const float16* __restrict from, int64_t n, int64_t stride) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; i++) to[i] = widen(from[i * stride]);
}
template <> inline void store(const float* __restrict from, float16* __restrict to, int64_t n, int64_t stride) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
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

template <class F> inline void with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(data));
    case DType::f64: return f(static_cast<double*>(data));
    case DType::bf16: return f(static_cast<bfloat16*>(data));
    case DType::f16: return f(static_cast<float16*>(data));
  }
}

// ---- an update over n elements: param and grad of type P, state of type S, arithmetic in T

template <class Optimizer, unsigned used, class T, class P, class S>
void update(void* const* data, int64_t n, const void* scalars) {
  const auto h = *static_cast<const typename Optimizer::template Scalars<T>*>(scalars);
  P* __restrict param = static_cast<P*>(data[0]);
  const P* __restrict grad = static_cast<const P*>(data[1]);
  S* __restrict slot0 = static_cast<S*>(data[2]);
  S* __restrict slot1 = static_cast<S*>(data[3]);
  S* __restrict slot2 = static_cast<S*>(data[4]);
  for (int64_t i = 0; i < n; i++) {
    T p = widen(param[i]), state[max_slots] = {};
    if constexpr (used & 1) state[0] = widen(slot0[i]);
    if constexpr (used & 2) state[1] = widen(slot1[i]);
    if constexpr (used & 4) state[2] = widen(slot2[i]);
    Optimizer::template update<used, T>(p, widen(grad[i]), state, h);
    narrow(p, param[i]);
    if constexpr (used & 1) narrow(state[0], slot0[i]);
    if constexpr (used & 2) narrow(state[1], slot1[i]);
    if constexpr (used & 4) narrow(state[2], slot2[i]);
  }
}

using Update = void (*)(void* const*, int64_t, const void*);
struct Updates { Update of[1 << max_slots]; };  // by mask of used slots

template <class Optimizer, unsigned used, class... Types> constexpr Update update_or_null() {
  constexpr unsigned all = (1u << sizeof(Optimizer::slots) / sizeof(char*)) - 1;
  if constexpr ((used & ~all) == 0 && (used & Optimizer::required) == Optimizer::required) return &update<Optimizer, used, Types...>;
  else return nullptr;
}
template <class Optimizer, class... Types, unsigned... used>
constexpr Updates updates_of(std::integer_sequence<unsigned, used...>) {
  return {{update_or_null<Optimizer, used, Types...>()...}};
}
template <class T, class P, class S, class... Optimizer>
Update find_update(const Row& row, std::tuple<Optimizer...>*) {
  static constexpr Updates updates[] = {updates_of<Optimizer, T, P, S>(std::make_integer_sequence<unsigned, 1 << max_slots>())...};
  return updates[row.optimizer].of[row.used];
}
template <class T, class P, class S> Update find_update(const Row& row) {
  return find_update<T, P, S>(row, static_cast<Optimizers*>(nullptr));
}

// ---- elements [begin, end) of a row

// The update that runs on memory itself, or null.
Update find_direct(const Row& row) {
  if (row.layout) return nullptr;
  const DType param = row.dtype[0];
  DType state = param;
  for (int k = 2, first = 1; k < max_operands; k++) {
    if (!row.data[k]) continue;
    if (!first && row.dtype[k] != state) return nullptr;
    state = row.dtype[k], first = 0;
  }
  if (param == DType::f32 && state == DType::f32) return find_update<float, float, float>(row);
  if (param == DType::f64 && state == DType::f64) return find_update<double, double, double>(row);
  if (param == DType::bf16 && state == DType::bf16) return find_update<float, bfloat16, bfloat16>(row);
  if (param == DType::bf16 && state == DType::f32) return find_update<float, bfloat16, float>(row);
  return nullptr;
}

template <class T> void apply_in_blocks(const Row& row, int64_t begin, int64_t end, DType compute) {
  const Update update = find_update<T, T, T>(row);
  void* data[max_operands] = {};
  alignas(64) T blocks[max_operands][block];
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = end - at < block ? end - at : block;
    for (int k = 0; k < max_operands; k++) {
      if (!row.data[k]) continue;
      if (!row.layout && row.dtype[k] == compute) {
        data[k] = static_cast<T*>(row.data[k]) + at;
        continue;
      }
      data[k] = blocks[k];
      with_type(row.dtype[k], row.data[k], [&](auto* memory) {
        for_runs(memory, row.layout, k, at, n, [&](auto* from, int64_t i, int64_t run, int64_t stride) {
          load(blocks[k] + i, from, run, stride);
        });
      });
    }
    update(data, n, row.scalars);
    for (int k = 0; k < max_operands; k++) {
      if (k == 1 || data[k] != blocks[k]) continue;
      with_type(row.dtype[k], row.data[k], [&](auto* memory) {
        for_runs(memory, row.layout, k, at, n, [&](auto* to, int64_t i, int64_t run, int64_t stride) {
          store(blocks[k] + i, to, run, stride);
        });
      });
    }
  }
}

void apply(const Row& row, int64_t begin, int64_t end) {
  if (const Update update = find_direct(row)) {
    void* data[max_operands] = {};
    for (int k = 0; k < max_operands; k++)
      if (row.data[k]) data[k] = static_cast<char*>(row.data[k]) + begin * itemsize(row.dtype[k]);
    return update(data, end - begin, row.scalars);
  }
  if (row.dtype[0] == DType::f64) apply_in_blocks<double>(row, begin, end, DType::f64);
  else apply_in_blocks<float>(row, begin, end, DType::f32);
}

}  // namespace
}  // namespace fastopt
