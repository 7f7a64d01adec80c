// Between numbers and what is stored of them: bf16 and fp16, converted one by one with integer arithmetic (round to nearest even),
// whatever the denormal mode; fp32 in two parts, a bf16 number and what is left; and rounding with random bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastopt {
namespace {

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

// ---- fp32 in two parts of 16 bits: the nearest bf16 number, of two the one further from zero, and what must be added to its bits

// A remainder that makes NaN of the number beside it was left by another one: the number counts. It is a zero or an infinity that was
// written from outside; part() leaves no such pair.
inline float join(bfloat16 number, int16_t remainder) {
  const float joined = float_of((uint32_t(number.bits) << 16) + uint32_t(remainder));
  return joined == joined ? joined : widen(number);
}
// Exact and undone by join(), also where the number becomes infinity; of NaN there is no remainder.
inline void part(float value, bfloat16& number, int16_t& remainder) {
  const uint32_t bits = bits_of(value);
  number.bits = uint16_t(value != value ? 0x7fc0 : (bits + 0x8000) >> 16);
  remainder = int16_t(value != value ? 0 : bits);
}

// ---- rounding away from zero with the probability of what is cut off, toward zero else, by 16 random bits (philox.h)
//
// What 16 bits hold stays as it is. The probability is exact, but for fp16 below 2^-14: there it is cut to a multiple of 2^-16. The
// largest number's neighbour is infinity.

inline void narrow_stochastically(float value, uint16_t random, bfloat16& out) {
  out.bits = uint16_t(value != value ? 0x7fc0 : (bits_of(value) + random) >> 16);
}
inline void narrow_stochastically(float value, uint16_t random, float16& out) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const bool is_small = magnitude < 113u << 23;                                      // counted in 2^-24, of which 2^-40 is a part in 2^16
  const uint32_t subnormal = (uint32_t(int32_t(float_of(is_small ? magnitude : 0) * 0x1p40f)) + random) >> 16;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  const uint32_t finite = is_small ? subnormal : normal;
  out.bits = uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x47800000 ? 0x7c00 : finite));
}

}  // namespace
}  // namespace fastopt
