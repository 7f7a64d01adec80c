// Between numbers and what is stored of them: bf16 and fp16, converted one by one with integer arithmetic (round to nearest even),
// whatever the denormal mode.
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

}  // namespace
}  // namespace fastopt
