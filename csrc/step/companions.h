// Parameters of 16 bits of which a step keeps more: n elements as fp32, from and to memory. With a companion (rows.h), or rounded with
// random bits.
#pragma once
#include "philox.h"
#include "round.h"
#if defined(FASTOPT_VECTOR_BYTES)
#include "simd.h"
#endif

namespace fastopt {
namespace {

// ---- bf16 and its remainder: the master in two parts

inline void load_masters(float* __restrict to, const bfloat16* __restrict numbers, const int16_t* __restrict remainders, int64_t n) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Floats a, b;
    load<false>(a, b, numbers + i, remainders + i);
    store<false>(a, b, to + i);
  }
#endif
  for (; i < n; i++) to[i] = join(numbers[i], remainders[i]);
}
inline void store_masters(const float* __restrict from, bfloat16* __restrict numbers, int16_t* __restrict remainders, int64_t n) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Floats a, b;
    load<false>(a, b, from + i);
    store<false>(a, b, numbers + i, remainders + i);
  }
#endif
  for (; i < n; i++) part(from[i], numbers[i], remainders[i]);
}

// ---- fp16 and its master. A number that is not the master rounded was written by someone else: it counts, and the master begins anew

inline float master_of(float16 number, float master) {
  float16 rounded;
  narrow(master, rounded);
  return rounded.bits == number.bits ? master : widen(number);
}
inline void load_masters(float* __restrict to, const float16* __restrict numbers, const float* __restrict masters, int64_t n) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + lanes <= n; i += lanes) {
    const Vector master = read<Vector>(masters + i), number = from_half(read<Halves>(numbers + i));
    write((Bits(from_half(to_half(master))) == Bits(number) ? master : number), to + i);
  }
#endif
  for (; i < n; i++) to[i] = master_of(numbers[i], masters[i]);
}
inline void store_masters(const float* __restrict from, float16* __restrict numbers, float* __restrict masters, int64_t n) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + lanes <= n; i += lanes) {
    const Vector master = read<Vector>(from + i);
    write(master, masters + i), write(to_half(master), numbers + i);
  }
#endif
  for (; i < n; i++) masters[i] = from[i], narrow(from[i], numbers[i]);
}

// ---- rounded with random bits, 16 for each number

template <class S>
inline void store_stochastically(const float* __restrict from, S* __restrict numbers, const uint16_t* __restrict randoms, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow_stochastically(from[i], randoms[i], numbers[i]);
}

}  // namespace
}  // namespace fastopt
