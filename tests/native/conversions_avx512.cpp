// The conversions of conversions.h for AVX-512, as csrc/step/isa_avx512.cpp compiles the machinery; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "checks.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define FASTOPT_VECTOR_BYTES 64
#include "conversions.h"

const Conversions conversions_avx512 = fastopt::conversions;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
