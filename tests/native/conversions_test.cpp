// Conversions between fp32 and what 16 bits hold, for every pattern: those of step/round.h, and on every ISA those of the steps
// themselves, by rows whose arithmetic is exact, so that what is stored is one number rounded once.
//
// The reference knows no bit tricks: what a pattern stands for is an integer times a power of two, and a number belongs to the pattern
// that is nearest to it. So the fp32 numbers that become one pattern are those up to the middle between it and the next.
#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "checks.h"
#include "step/algorithms.h"
#include "step/isa.h"
#include "step/round.h"

using namespace fastopt;

namespace {

constexpr uint32_t sign32 = 0x80000000, infinity32 = 0x7f800000;
constexpr uint16_t sign16 = 0x8000;

struct Format {
  const char* name;
  DType dtype;
  int mantissa_bits;
  std::vector<uint32_t> last;                     // of each pattern without sign, up to infinity: the largest number that becomes it

  Format(const char* name, DType dtype, int mantissa_bits) : name(name), dtype(dtype), mantissa_bits(mantissa_bits) {
    for (uint16_t h = 0; h < infinity(); h++) {
      const float middle = float((value(h) + value(uint16_t(h + 1))) / 2);
      last.push_back(bits_of(middle) - (h & 1));  // which belongs to the even one
    }
    last.push_back(infinity32);
  }
  uint16_t infinity() const { return uint16_t(0x7fff >> mantissa_bits << mantissa_bits); }
  // What a pattern without sign stands for; of infinity, what it would be as a number.
  double value(uint16_t h) const {
    const int exponent = h >> mantissa_bits, mantissa = h & ((1 << mantissa_bits) - 1), bias = (1 << (14 - mantissa_bits)) - 1;
    const int implicit = exponent ? 1 << mantissa_bits : 0;
    return std::ldexp(double(implicit + mantissa), (exponent ? exponent : 1) - bias - mantissa_bits);
  }
};

// Whether `stored` is what ascending fp32 patterns become. They all have one sign.
bool is_nearest(const Format& format, const uint32_t* patterns, const uint16_t* stored, size_t n) {
  const uint16_t sign = patterns[0] & sign32 ? sign16 : 0;
  auto magnitude_below = [](uint32_t a, uint32_t b) { return a < (b & ~sign32); };
  size_t h = size_t(std::lower_bound(format.last.begin(), format.last.end(), patterns[0] & ~sign32) - format.last.begin());
  unsigned wrong = 0;
  for (size_t i = 0; i < n; h++) {
    if (h == format.last.size()) {                // the rest is NaN
      for (; i < n; i++) wrong |= (stored[i] & ~sign16) <= format.infinity();
      break;
    }
    const size_t end = size_t(std::upper_bound(patterns + i, patterns + n, format.last[h], magnitude_below) - patterns);
    for (const uint16_t expected = uint16_t(sign | h); i < end; i++) wrong |= unsigned(stored[i] ^ expected);
  }
  return !wrong;
}

// ---- fp32 patterns, in blocks shared among threads

constexpr size_t block_size = 1 << 14;

// Calls store(patterns, stored, n) for every `stride`-th pattern, and for those between which the result changes.
template <class F> bool nearest_for_all(const Format& format, uint32_t stride, F store) {
  std::vector<uint32_t> edges;                    // without sign
  if (stride > 1)
    for (uint32_t last : format.last) edges.push_back(last), edges.push_back(last + 1);
  std::atomic<bool> good{true};
  auto run = [&](const uint32_t* patterns, size_t n, std::vector<uint16_t>& stored) {
    store(patterns, stored.data(), n);
    if (!is_nearest(format, patterns, stored.data(), n)) good = false;
  };
  const unsigned count = std::max(2u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; t++)
    threads.emplace_back([&, t] {
      std::vector<uint32_t> patterns(block_size);
      std::vector<uint16_t> stored(block_size);
      for (uint32_t sign : {0u, sign32}) {
        const uint64_t total = (uint64_t(sign32) + stride - 1) / stride;
        for (uint64_t from = t * block_size; from < total; from += count * block_size) {
          const size_t n = size_t(std::min<uint64_t>(block_size, total - from));
          for (size_t i = 0; i < n; i++) patterns[i] = sign | uint32_t(from + i) * stride;
          run(patterns.data(), n, stored);
        }
        for (size_t from = t * block_size; from < edges.size(); from += count * block_size) {
          const size_t n = std::min(block_size, edges.size() - from);
          for (size_t i = 0; i < n; i++) patterns[i] = sign | edges[from + i];
          run(patterns.data(), n, stored);
        }
      }
    });
  for (auto& thread : threads) thread.join();
  return good;
}

// ---- rows whose arithmetic is exact: SGD with momentum 1 is buf += grad, param += neg_lr * buf

using Scalars = SGD::Scalars<float>;
Scalars scalars_of(float neg_lr) { return Scalars(SGD::Hyper<double>{-double(neg_lr), 1, 0, 0, 0, 0}, 2); }

Row row_of(DType param_dtype, void* param, const void* grad, DType state_dtype, void* state, size_t n, const Scalars& scalars) {
  Row row = {};
  row.used = 1u << SGD::momentum_buffer;          // algorithm 0 of all
  row.data[0] = param, row.data[1] = const_cast<void*>(grad), row.data[2] = state;
  row.dtype[0] = row.dtype[1] = param_dtype, row.dtype[2] = state_dtype;
  row.numel = int64_t(n), row.scalars = &scalars;
  return row;
}
static_assert(std::is_same_v<std::tuple_element_t<0, Algorithms>, SGD>);

constexpr uint16_t minus_zero = sign16;           // what is added to it stays what it is, a zero of either sign too

// A 16-bit parameter becomes the fp32 state's number.
bool param_is_nearest(const Isa& isa, const Format& format, uint32_t stride) {
  const Scalars scalars = scalars_of(1);
  return nearest_for_all(format, stride, [&](const uint32_t* patterns, uint16_t* stored, size_t n) {
    static const std::vector<uint16_t> grad(block_size, minus_zero);
    thread_local std::vector<uint32_t> state(block_size);
    std::copy_n(patterns, n, state.begin()), std::fill_n(stored, n, minus_zero);
    isa.apply(row_of(format.dtype, stored, grad.data(), DType::f32, state.data(), n, scalars), {}, 0, int64_t(n));
  });
}

// 16-bit state becomes the number of the fp32 gradient: dtypes that no update runs on directly.
bool state_is_nearest(const Isa& isa, const Format& format, uint32_t stride) {
  const Scalars scalars = scalars_of(0);
  return nearest_for_all(format, stride, [&](const uint32_t* patterns, uint16_t* stored, size_t n) {
    thread_local std::vector<uint32_t> param(block_size);
    std::fill_n(param.begin(), n, 0), std::fill_n(stored, n, minus_zero);
    isa.apply(row_of(DType::f32, param.data(), patterns, format.dtype, stored, n, scalars), {}, 0, int64_t(n));
  });
}

// Where parameter and state are bf16, a parameter with the upper half of a pattern becomes the whole, of which neg_lr is the lower half:
// counted in 2^-17, since a bf16 number is at least 2^-133 and the lower half of the least is counted in 2^-149. But for NaN, which has
// no arithmetic.
bool sum_is_nearest(const Isa& isa, const Format& bf16, uint32_t stride) {
  std::vector<uint16_t> upper, units, grad;
  for (uint32_t h = 0; h < 1 << 16; h++) {
    const uint16_t exponent = h >> 7 & 255, sign = h & sign16;
    if (exponent == 255) continue;
    float unit;
    narrow(std::ldexp(1.0f, std::max<int>(exponent, 1) - 150 + 17), reinterpret_cast<bfloat16&>(units.emplace_back()));
    unit = widen(bfloat16{units.back()});
    if (unit != std::ldexp(1.0f, std::max<int>(exponent, 1) - 150 + 17)) return false;
    units.back() |= sign, upper.push_back(uint16_t(h)), grad.push_back(minus_zero);
  }
  const size_t n = upper.size();
  std::vector<uint32_t> lowers = {0x7fff, 0x8000, 0x8001};
  for (uint32_t lower = 0; lower < 1 << 16; lower += stride) lowers.push_back(lower);
  std::atomic<bool> good{true};
  const unsigned count = std::max(2u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; t++)
    threads.emplace_back([&, t] {
      std::vector<uint16_t> param(n), state = units;
      for (size_t l = t; l < lowers.size(); l += count) {
        const uint32_t lower = lowers[l];
        const Scalars scalars = scalars_of(float(lower) * 0x1p-17f);
        param = upper;
        isa.apply(row_of(DType::bf16, param.data(), grad.data(), DType::bf16, state.data(), n, scalars), {}, 0, int64_t(n));
        unsigned wrong = 0;
        for (size_t i = 0; i < n; i++) {
          const uint32_t pattern = (uint32_t(upper[i]) << 16 | lower) & ~sign32;
          wrong |= unsigned(param[i] ^ uint16_t(upper[i] + (pattern > bf16.last[upper[i] & ~sign16])));
        }
        if (wrong || state != units) good = false;
      }
    });
  for (auto& thread : threads) thread.join();
  return good;
}

// ---- 16-bit patterns

bool is_value(const Format& format, uint16_t h, float number) {
  const uint16_t magnitude = h & ~sign16;
  if (magnitude > format.infinity()) return number != number;
  const double value = magnitude == format.infinity() ? double(INFINITY) : format.value(magnitude);
  return bits_of(number) == bits_of(float(h & sign16 ? -value : value));
}

// A 16-bit gradient becomes fp32 state, 16-bit state an fp32 parameter; and where all is 16 bits, a gradient becomes state, and that the
// parameter, as it is.
bool rows_widen(const Isa& isa, const Format& format) {
  constexpr size_t n = 1 << 16;
  const Scalars scalars = scalars_of(1);
  std::vector<uint16_t> all(n), zeros(n, minus_zero), more(n, minus_zero);
  for (size_t h = 0; h < n; h++) all[h] = uint16_t(h);
  std::vector<float> wide(n, -0.0f), wide_zeros(n, -0.0f), wider(n, -0.0f);
  isa.apply(row_of(format.dtype, zeros.data(), all.data(), DType::f32, wide.data(), n, scalars), {}, 0, n);
  std::vector<uint16_t> state = all;
  isa.apply(row_of(DType::f32, wider.data(), wide_zeros.data(), format.dtype, state.data(), n, scalars), {}, 0, n);
  std::vector<uint16_t> param(n, minus_zero);
  isa.apply(row_of(format.dtype, param.data(), all.data(), format.dtype, more.data(), n, scalars), {}, 0, n);
  bool good = true;
  for (size_t h = 0; h < n; h++) {
    good = good && is_value(format, all[h], wide[h]) && is_value(format, all[h], wider[h]);
    for (uint16_t stored : {param[h], more[h], state[h], zeros[h]})
      good = good && (stored == all[h] || ((all[h] & ~sign16) > format.infinity() && (stored & ~sign16) > format.infinity()));
  }
  return good;
}

template <class T> void check(const Format& format) {
  bool widens = true;
  for (uint32_t h = 0; h < 1 << 16; h++) widens = widens && is_value(format, uint16_t(h), widen(T{uint16_t(h)}));
  expect(widens, "widening %s", format.name);
  const bool narrows = nearest_for_all(format, STRIDE, [](const uint32_t* patterns, uint16_t* stored, size_t n) {
    for (size_t i = 0; i < n; i++) {
      T narrowed;
      narrow(float_of(patterns[i]), narrowed);
      stored[i] = narrowed.bits;
    }
  });
  expect(narrows, "narrowing to %s", format.name);
  for (int i = 0; i < isa_count; i++) {
    if (!isas[i].supported()) continue;
    // what is compiled without vectors has the conversions that were just tested, and an fma that takes long without the instruction
    const uint32_t stride = i ? STRIDE : STRIDE * 61;
    expect(rows_widen(isas[i], format), "%s widens %s", isas[i].name, format.name);
    expect(param_is_nearest(isas[i], format, stride), "%s rounds parameters to %s", isas[i].name, format.name);
    expect(state_is_nearest(isas[i], format, stride), "%s rounds state to %s", isas[i].name, format.name);
    if (format.dtype == DType::bf16) expect(sum_is_nearest(isas[i], format, stride), "%s rounds sums to %s", isas[i].name, format.name);
  }
}

}  // namespace

void check_conversions() {
  check<bfloat16>(Format("bfloat16", DType::bf16, 7));
  check<float16>(Format("float16", DType::f16, 10));
}
