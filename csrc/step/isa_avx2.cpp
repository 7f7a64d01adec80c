// The machinery for x86-64 with AVX2; empty elsewhere. System headers come first: they are not compiled for this ISA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTOPT_VECTOR_BYTES 32
#include "apply.h"
#include "reduce.h"

namespace fastopt {
void apply_avx2(const Row& row, const Stages& stages, int64_t begin, int64_t end) { apply(row, stages, begin, end); }
void reduce_avx2(const Row& row, Norm norm, const Stages& stages, int64_t begin, int64_t end, double* tiles) {
  reduce(row, norm, stages, begin, end, tiles);
}
}  // namespace fastopt
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
