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
typedef int32_t Signed __attribute__((vector_size(FASTOPT_VECTOR_BYTES)));
typedef uint64_t Wides __attribute__((vector_size(FASTOPT_VECTOR_BYTES)));

// What differs between the two. Masked by hand: what g++ 12 has for the unmasked forms of AVX-512
// warns of uninitialised variables. By hand as well where __builtin_convertvector takes g++ 12 twice as many instructions.
#if FASTOPT_VECTOR_BYTES == 64
typedef __m512 Vector;
constexpr __mmask16 every = 0xffff;
inline Vector broadcast(float a) { return _mm512_set1_ps(a); }
inline Vector vector_fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector vector_sqrt(Vector a) { return _mm512_maskz_sqrt_ps(every, a); }
inline Vector vector_larger(Vector a, Vector b) { return _mm512_maskz_max_ps(every, a, b); }
inline Vector from_half(Halves a) { return _mm512_maskz_cvtph_ps(every, __m256i(a)); }
inline Halves to_half(Vector a) { return Halves(_mm512_maskz_cvtps_ph(every, a, _MM_FROUND_TO_NEAREST_INT)); }
inline Bits zero_extended(Halves a) { return Bits(_mm512_maskz_cvtepu16_epi32(every, __m256i(a))); }
inline Bits sign_extended(Halves a) { return Bits(_mm512_maskz_cvtepi16_epi32(every, __m256i(a))); }
inline Wides product(Wides a, uint32_t b) { return Wides(_mm512_maskz_mul_epu32(0xff, __m512i(a), _mm512_set1_epi64(b))); }
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
inline Bits zero_extended(Halves a) { return Bits(_mm256_cvtepu16_epi32(__m128i(a))); }
inline Bits sign_extended(Halves a) { return Bits(_mm256_cvtepi16_epi32(__m128i(a))); }
inline Wides product(Wides a, uint32_t b) { return Wides(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b))); }
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

// Of NaN there is no remainder, nor anything that an addition could carry over.
inline Bits without_remainder(Floats a) { return Bits(select(a != a, float_of(0x7fc00000), a).v); }

// A pair in order, to bf16, to both parts, and to bf16 after random bits were added.
#if FASTOPT_VECTOR_BYTES == 64
constexpr struct Order {
  alignas(64) int16_t of_upper[32] = {}, of_lower[32] = {};   // 16 bits of every number
  constexpr Order() {
    for (int i = 0; i < 32; i++) of_upper[i] = int16_t(2 * i + 1), of_lower[i] = int16_t(2 * i);
  }
} order;
inline __m512i pick(const int16_t (&halves)[32], Vector a, Vector b) {
  return _mm512_permutex2var_epi16(__m512i(a), _mm512_load_si512(halves), __m512i(b));
}
inline __mmask32 are_nan(Vector a, Vector b) {
  return _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
}
inline void write_rounded(Vector a, Vector b, bfloat16* to) {
  const __m512i upper = pick(order.of_upper, a, b), lower = pick(order.of_lower, a, b), one = _mm512_set1_epi16(1);
  const __m512i last_down = _mm512_sub_epi16(_mm512_set1_epi16(-0x8000), _mm512_and_si512(upper, one));
  const __m512i near = _mm512_mask_add_epi16(upper, _mm512_cmpgt_epu16_mask(lower, last_down), upper, one);
  write(_mm512_mask_mov_epi16(near, are_nan(a, b), _mm512_set1_epi16(0x7fc0)), to);
}
inline void write_parts(Vector a, Vector b, bfloat16* to, int16_t* remainders) {
  const __m512i upper = pick(order.of_upper, a, b), lower = pick(order.of_lower, a, b);
  const __m512i near = _mm512_add_epi16(upper, _mm512_srli_epi16(lower, 15));
  const __mmask32 nan = are_nan(a, b);
  write(_mm512_mask_mov_epi16(near, nan, _mm512_set1_epi16(0x7fc0)), to);
  write(_mm512_maskz_mov_epi16(~nan, lower), remainders);
}
inline void write_sums(Vector a, Vector b, const uint16_t* randoms, bfloat16* to) {
  const Bits x = Bits(a) + zero_extended(read<Halves>(randoms)), y = Bits(b) + zero_extended(read<Halves>(randoms + 16));
  write(_mm512_mask_mov_epi16(pick(order.of_upper, Vector(x), Vector(y)), are_nan(a, b), _mm512_set1_epi16(0x7fc0)), to);
}
#else
template <class S> inline void write_halves(Bits a, Bits b, S* to) {
  write(_mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(a), __m256i(b)), 0xd8), to);
}
inline void write_rounded(Vector a, Vector b, bfloat16* to) {
  const Floats x = select(a != a, Floats(NAN), a), y = select(b != b, Floats(NAN), b);
  write_halves(rounded(x) >> 16, rounded(y) >> 16, to);
}
inline void write_parts(Vector a, Vector b, bfloat16* to, int16_t* remainders) {
  const Bits x = without_remainder(a), y = without_remainder(b);
  write_halves((x + 0x8000) >> 16, (y + 0x8000) >> 16, to), write_halves(x & 0xffff, y & 0xffff, remainders);
}
inline void write_sums(Vector a, Vector b, const uint16_t* randoms, bfloat16* to) {
  const Bits x = without_remainder(a), y = without_remainder(b);
  write_halves((x + zero_extended(read<Halves>(randoms))) >> 16, (y + zero_extended(read<Halves>(randoms + 8))) >> 16, to);
}
#endif

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
    a = Vector(zero_extended(read<Halves>(from)) << 16), b = Vector(zero_extended(read<Halves>(from + lanes)) << 16);
  }
}
template <bool split> inline void store(Floats a, Floats b, bfloat16* to) {
  if constexpr (split) {
    write(rounded(a) >> 16 | (rounded(b) & 0xffff0000), to);
  } else {
    write_rounded(a.v, b.v, to);
  }
}

// ---- a pair of fp32 in two parts, as join() and part() of round.h have them

inline Floats joined(Bits number, Bits remainder) {
  const Floats both = Vector(number + remainder);
  return select(both != both, Floats(Vector(number)), both);
}
template <bool split> inline void load(Floats& a, Floats& b, const bfloat16* from, const int16_t* remainders) {
  if constexpr (split) {
    const Bits both = read<Bits>(from), rest = read<Bits>(remainders);
    a = joined(both << 16, Bits(Signed(rest << 16) >> 16)), b = joined(both & 0xffff0000, Bits(Signed(rest) >> 16));
  } else {
    a = joined(zero_extended(read<Halves>(from)) << 16, sign_extended(read<Halves>(remainders)));
    b = joined(zero_extended(read<Halves>(from + lanes)) << 16, sign_extended(read<Halves>(remainders + lanes)));
  }
}
template <bool split> inline void store(Floats a, Floats b, bfloat16* to, int16_t* remainders) {
  if constexpr (split) {
    const Bits x = without_remainder(a), y = without_remainder(b);
    write((x + 0x8000) >> 16 | ((y + 0x8000) & 0xffff0000), to), write((x & 0xffff) | y << 16, remainders);
  } else {
    write_parts(a.v, b.v, to, remainders);
  }
}

// ---- a pair rounded with 16 random bits for each number, as narrow_stochastically() does it

template <bool split> inline void store(Floats a, Floats b, bfloat16* to, const uint16_t* randoms) {
  if constexpr (split) {
    const Bits both = read<Bits>(randoms);
    write((without_remainder(a) + (both & 0xffff)) >> 16 | ((without_remainder(b) + (both >> 16)) & 0xffff0000), to);
  } else {
    write_sums(a.v, b.v, randoms, to);
  }
}

}  // namespace
}  // namespace fastopt
