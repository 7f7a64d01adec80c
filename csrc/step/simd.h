// Many fp32 numbers at once, for AVX2 and AVX-512: a type that the updates compute with, and its ways from memory and back.
//
// Vectors travel in pairs. Two neighbours in bf16 are the halves of 32 bits, so a pair that is split into the even elements and the odd
// ones is read and written with half the instructions of one in order; an update does not care, if all its operands are split.
#pragma once
#include <immintrin.h>

#include "round.h"

namespace fastopt {
namespace {

typedef uint32_t Bits __attribute__((vector_size(FASTOPT_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FASTOPT_VECTOR_BYTES / 2)));

// What differs between the two. Masked by hand: what g++ 12 has for the unmasked forms of AVX-512 warns of uninitialised variables.
#if FASTOPT_VECTOR_BYTES == 64
typedef __m512 Vector;
constexpr __mmask16 every = 0xffff;
inline Vector broadcast(float a) { return _mm512_set1_ps(a); }
inline Vector vector_fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector vector_sqrt(Vector a) { return _mm512_maskz_sqrt_ps(every, a); }
inline Vector vector_larger(Vector a, Vector b) { return _mm512_maskz_max_ps(every, a, b); }
inline Vector from_half(Halves a) { return _mm512_maskz_cvtph_ps(every, __m256i(a)); }
inline Halves to_half(Vector a) { return Halves(_mm512_maskz_cvtps_ph(every, a, _MM_FROUND_TO_NEAREST_INT)); }
inline __m512d to_doubles(__m256 a) { return _mm512_maskz_cvtps_pd(0xff, a); }
inline Bits plus_bit_16(Bits a, Bits of) {
  return Bits(_mm512_mask_add_epi32(__m512i(a), _mm512_test_epi32_mask(__m512i(of), _mm512_set1_epi32(1 << 16)), __m512i(a), _mm512_set1_epi32(1)));
}
#else
typedef __m256 Vector;
inline Vector broadcast(float a) { return _mm256_set1_ps(a); }
inline Vector vector_fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector vector_sqrt(Vector a) { return _mm256_sqrt_ps(a); }
inline Vector vector_larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector from_half(Halves a) { return _mm256_cvtph_ps(__m128i(a)); }
inline Halves to_half(Vector a) { return Halves(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
inline __m256d to_doubles(__m128 a) { return _mm256_cvtps_pd(a); }
inline Bits plus_bit_16(Bits a, Bits of) { return a + (of >> 16 & 1); }
#endif

struct Floats {
  Vector v;
  Floats() = default;
  Floats(Vector vector) : v(vector) {}
  Floats(float number) : v(broadcast(number)) {}
};
constexpr int lanes = sizeof(Floats) / sizeof(float);

inline Floats operator+(Floats a, Floats b) { return a.v + b.v; }
inline Floats operator-(Floats a, Floats b) { return a.v - b.v; }
inline Floats operator*(Floats a, Floats b) { return a.v * b.v; }
inline Floats operator/(Floats a, Floats b) { return a.v / b.v; }
inline Floats operator-(Floats a) { return -a.v; }
inline auto operator!=(Floats a, Floats b) { return a.v != b.v; }
inline auto operator<(Floats a, Floats b) { return a.v < b.v; }
inline Floats fma(Floats a, Floats b, Floats c) { return vector_fma(a.v, b.v, c.v); }
inline Floats sqrt(Floats a) { return vector_sqrt(a.v); }
inline Floats larger(Floats a, Floats b) { return vector_larger(a.v, b.v); }
inline Floats select(bool condition, Floats a, Floats b) { return condition ? a.v : b.v; }
template <class Mask> inline Floats select(Mask condition, Floats a, Floats b) { return condition ? a.v : b.v; }

// ---- a pair in memory

template <class V, class S> inline V read(const S* from) { V vector; std::memcpy(&vector, from, sizeof vector); return vector; }
template <class V, class S> inline void write(V vector, S* to) { std::memcpy(to, &vector, sizeof vector); }

// To bf16 in the upper half of 32 bits, as narrow() does it. A NaN must have no bits in the lower half, or it could carry over.
inline Bits rounded(Floats a) { return plus_bit_16(Bits(a.v) + 0x7fff, Bits(a.v)); }

template <bool split> inline void load(Floats& a, Floats& b, const float* from) { a = read<Vector>(from), b = read<Vector>(from + lanes); }
template <bool split> inline void store(Floats a, Floats b, float* to) { write(a.v, to), write(b.v, to + lanes); }

template <bool split> inline void load(Floats& a, Floats& b, const float16* from) {
  a = from_half(read<Halves>(from)), b = from_half(read<Halves>(from + lanes));
}
template <bool split> inline void store(Floats a, Floats b, float16* to) { write(to_half(a.v), to), write(to_half(b.v), to + lanes); }

template <bool split> inline void load(Floats& a, Floats& b, const bfloat16* from) {
  if constexpr (split) {
    const Bits both = read<Bits>(from);
    a = Vector(both << 16), b = Vector(both & 0xffff0000);
  } else {
    a = Vector(__builtin_convertvector(read<Halves>(from), Bits) << 16);
    b = Vector(__builtin_convertvector(read<Halves>(from + lanes), Bits) << 16);
  }
}
template <bool split> inline void store(Floats a, Floats b, bfloat16* to) {
  if constexpr (split) {
    write(rounded(a) >> 16 | (rounded(b) & 0xffff0000), to);
  } else {
    a = select(a != a, Floats(NAN), a), b = select(b != b, Floats(NAN), b);
    write(__builtin_convertvector(rounded(a) >> 16, Halves), to);
    write(__builtin_convertvector(rounded(b) >> 16, Halves), to + lanes);
  }
}

}  // namespace
}  // namespace fastopt
