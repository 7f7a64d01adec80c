// Conversions of step/round.h, simd.h and philox.h over arrays, compiled once per instruction set as the machinery is.
#pragma once
#include "checks.h"
#include "step/philox.h"
#include "step/round.h"

namespace fastopt {
namespace {

template <bool split> void part_all(const float* from, uint16_t* to, int16_t* remainders, size_t n) {
  bfloat16* const numbers = reinterpret_cast<bfloat16*>(to);
  size_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Floats pair[2];
    for (size_t k = 0; k < 2 * lanes; k++) reinterpret_cast<float*>(pair)[k] = from[i + (split ? k % lanes * 2 + k / lanes : k)];
    store<split>(pair[0], pair[1], numbers + i, remainders + i);
  }
#endif
  for (; i < n; i++) part(from[i], numbers[i], remainders[i]);
}
template <bool split> void join_all(const uint16_t* from, const int16_t* remainders, float* to, size_t n) {
  const bfloat16* const numbers = reinterpret_cast<const bfloat16*>(from);
  size_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    Floats pair[2];
    load<split>(pair[0], pair[1], numbers + i, remainders + i);
    for (size_t k = 0; k < 2 * lanes; k++) to[i + (split ? k % lanes * 2 + k / lanes : k)] = reinterpret_cast<float*>(pair)[k];
  }
#endif
  for (; i < n; i++) to[i] = join(numbers[i], remainders[i]);
}
template <class T> void narrow_all(const float* from, const uint16_t* randoms, uint16_t* to, size_t n) {
  for (size_t i = 0; i < n; i++) {
    T narrowed;
    narrow_stochastically(from[i], randoms[i], narrowed);
    to[i] = narrowed.bits;
  }
}
void draw_all(uint64_t seed, uint64_t step, uint32_t position, int64_t begin, int64_t n, uint16_t* to) {
  Randoms(seed, step, position).draw(begin, n, to);
}

constexpr Conversions conversions = {{&part_all<false>, &part_all<true>},
                                     {&join_all<false>, &join_all<true>},
                                     &narrow_all<bfloat16>,
                                     &narrow_all<float16>,
                                     &draw_all};

}  // namespace
}  // namespace fastopt
