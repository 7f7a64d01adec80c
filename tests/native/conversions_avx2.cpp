// The conversions of conversions.h for AVX2, as csrc/step/isa_avx2.cpp compiles the machinery; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "checks.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTOPT_VECTOR_BYTES 32
#include "conversions.h"

const Conversions conversions_avx2 = fastopt::conversions;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
