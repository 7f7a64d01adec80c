// Conversions between fp32 and what 16 bits hold, for every pattern: those of step/round.h, and on every ISA those of the steps
// themselves, by rows whose arithmetic is exact, so that what is stored is one number rounded once.
//
// The reference knows no bit tricks: what a pattern stands for is an integer times a power of two, and a number belongs to the pattern
// that is nearest to it. So the fp32 numbers that become one pattern are those up to the middle between it and the next. And the two parts
// of an fp32 number, rounding with random bits, and those bits.
#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "conversions.h"
#include "step/algorithms.h"
#include "step/isa.h"

using namespace fastopt;

namespace {

constexpr uint32_t sign32 = 0x80000000, infinity32 = 0x7f800000;
constexpr uint16_t sign16 = 0x8000;

struct Format {
  const char* name;
  DType dtype;
  int mantissa_bits;
  std::vector<uint32_t> last;                     // of each pattern without sign, up to infinity: the largest number that becomes it

  Format(const char* name, DType dtype, int mantissa_bits, bool ties_to_even = true)
      : name(name), dtype(dtype), mantissa_bits(mantissa_bits) {
    for (uint16_t h = 0; h < infinity(); h++) {
      const float middle = float((value(h) + value(uint16_t(h + 1))) / 2);
      last.push_back(bits_of(middle) - (ties_to_even ? h & 1 : 1));   // which belongs to the even one, or to that further from zero
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

// ---- fp32 in two parts

// Both parts of every pattern: the nearest, and what joins to the same pattern. `parted`: 1 where vectors have even or odd elements.
bool parts_join(const Conversions& isa, int parted) {
  return nearest_for_all(Format("bfloat16", DType::bf16, 7, false), STRIDE, [&](const uint32_t* patterns, uint16_t* stored, size_t n) {
    thread_local std::vector<float> numbers(block_size), joined(block_size);
    thread_local std::vector<int16_t> remainders(block_size);
    std::memcpy(numbers.data(), patterns, n * 4);
    isa.part[parted](numbers.data(), stored, remainders.data(), n);
    isa.join[parted](stored, remainders.data(), joined.data(), n);
    unsigned wrong = 0;
    for (size_t i = 0; i < n; i++) {
      const uint32_t again = bits_of(joined[i]);
      const bool is_nan = (patterns[i] & ~sign32) > infinity32, stays_nan = (again & ~sign32) > infinity32 && remainders[i] == 0;
      wrong |= is_nan ? !stays_nan : again ^ patterns[i];
    }
    if (wrong) std::fill_n(stored, n, uint16_t(patterns[0] >> 16 ^ sign16));   // which none of them becomes
  });
}

// What is written from outside beside a remainder: zeros and infinities stay, NaN stays NaN, and all else moves by half a unit at most.
bool joins_whatever_was_written(const Conversions& isa, int parted) {
  std::vector<uint16_t> numbers(1 << 16);
  std::vector<int16_t> remainders(1 << 16);
  std::vector<float> joined(1 << 16);
  for (size_t h = 0; h < 1 << 16; h++) numbers[h] = uint16_t(h);
  bool good = true;
  for (int remainder : {-0x8000, -0x7fff, -77, -1, 0, 1, 123, 0x7fff}) {
    std::fill(remainders.begin(), remainders.end(), int16_t(remainder));
    isa.join[parted](numbers.data(), remainders.data(), joined.data(), numbers.size());
    for (size_t h = 0; h < 1 << 16; h++) {
      const uint32_t sign = uint32_t(h & sign16) << 16, magnitude = uint32_t(h & ~sign16) << 16;
      const int kept = magnitude == 0 ? std::max(remainder, 0) : magnitude == infinity32 ? std::min(remainder, 0) : remainder;
      good &= magnitude > infinity32 ? joined[h] != joined[h] : bits_of(joined[h]) == (sign | (magnitude + uint32_t(kept)));
    }
  }
  return good;
}

// ---- rounding with random bits

// Of fp32 numbers all over: up where the random bits reach what the probability says, and never where nothing is cut off.
template <class F> bool rounds_with_probability(const Format& format, F narrow) {
  std::vector<double> values;                     // of patterns; behind infinity's, which it would have as a number, nothing but it
  for (uint32_t h = 0; h <= format.infinity(); h++) values.push_back(format.value(uint16_t(h)));
  std::vector<float> numbers;
  std::vector<uint16_t> randoms, expected, stored;
  auto add = [&](uint32_t pattern) {
    const float number = float_of(pattern);
    const uint16_t sign = pattern & sign32 ? sign16 : 0;
    const double magnitude = std::fabs(double(number));
    size_t h = format.infinity();
    double up = 0;
    if (magnitude < values.back()) {
      h = size_t(std::upper_bound(values.begin(), values.end(), magnitude) - values.begin()) - 1;
      up = std::floor((magnitude - values[h]) / (values[h + 1] - values[h]) * 0x1p16);
    }
    const int most = 0xffff, turn = int(0x1p16 - up);
    for (int random : {0, std::min(turn - 1, most), std::min(turn, most), most, int(random_below(1 << 16))}) {
      numbers.push_back(number), randoms.push_back(uint16_t(random));
      expected.push_back(number != number ? uint16_t(0xffff) : uint16_t(sign | (h + (random >= turn))));
    }
  };
  for (uint64_t pattern = 0; pattern < uint64_t(1) << 32; pattern += 4093) add(uint32_t(pattern));
  for (size_t h = 0; h < values.size(); h++) {
    const uint32_t itself = bits_of(float(values[h]));
    for (uint32_t near : {format.last[h] - 1, format.last[h], itself, itself + 1}) add(near), add(near | sign32);
  }
  stored.resize(numbers.size());
  narrow(numbers.data(), randoms.data(), stored.data(), numbers.size());
  unsigned wrong = 0;
  for (size_t i = 0; i < numbers.size(); i++)
    wrong |= expected[i] == 0xffff ? (stored[i] & ~sign16) <= format.infinity() : unsigned(stored[i] ^ expected[i]);
  return !wrong;
}

// The published words of Philox 4x32-10: kat_vectors of Random123.
bool philox_is_known() {
  const uint32_t ones = 0xffffffff, known[][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {ones, ones, ones, ones, ones, ones, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  bool good = true;
  for (auto& [c0, c1, c2, c3, k0, k1, w0, w1, w2, w3] : known) {
    uint64_t words[4] = {c0, c1, c2, c3};
    philox(words, k0, k1);
    const uint32_t expected[] = {w0, w1, w2, w3};
    for (int i = 0; i < 4; i++) good &= uint32_t(words[i]) == expected[i];
  }
  return good;
}

// The bits of elements are those of their counter's words, whatever is drawn with them, wherever it begins, and wholly in seed, step,
// position and element.
bool draws_what_philox_says(const Conversions& isa) {
  bool good = true;
  const uint64_t seeds[] = {0, 1, uint64_t(1) << 32, ~uint64_t(0)}, steps[] = {1, uint64_t(1) << 32, (uint64_t(1) << 48) - 1};
  for (int64_t begin : {int64_t(0), int64_t(64), (int64_t(1) << 35) - 64, (int64_t(1) << 50) + 512})
    for (int64_t n : {1, 8, 9, 64, 65, 127, 512})
      for (uint64_t seed : seeds)
        for (uint64_t step : steps)
          for (uint32_t position : {0u, 1u, 0xffffffffu}) {
            std::vector<uint16_t> drawn(size_t(n + 7) / 8 * 8 + 1, 0x1234);
            isa.draw(seed, step, position, begin, n, drawn.data());
            for (int64_t i = 0; i < n; i++) {
              const uint64_t block = uint64_t(begin + i) / 8;
              uint64_t words[4] = {uint32_t(block), uint32_t(block >> 32 | step >> 32 << 16), uint32_t(step), position};
              philox(words, uint32_t(seed), uint32_t(seed >> 32));
              good &= drawn[size_t(i)] == uint16_t(words[i % 8 / 2] >> i % 2 * 16);
            }
            good &= drawn.back() == 0x1234;
          }
  return good;
}

// Over a million draws, numbers between two that 16 bits hold become their mean.
bool is_unbiased(const Conversions& isa) {
  constexpr size_t n = 1000000;
  std::vector<uint16_t> randoms(n), stored(n);
  isa.draw(42, 7, 3, 0, n, randoms.data());
  bool good = true;
  const Format bf16("bfloat16", DType::bf16, 7), f16("float16", DType::f16, 10);
  for (float number : {1.001f, -3.14159f, 1e-7f, 0.3333f, -6.5e-5f, 2e-8f})
    for (bool half : {false, true}) {
      const Format& format = half ? f16 : bf16;
      const std::vector<float> numbers(n, number);
      (half ? isa.narrow_stochastically_f16 : isa.narrow_stochastically_bf16)(numbers.data(), randoms.data(), stored.data(), n);
      double sum = 0, least = INFINITY, most = 0;
      for (uint16_t h : stored) {
        const double value = format.value(h & ~sign16);
        sum += value, least = std::min(least, value), most = std::max(most, value);
      }
      const double unit = most - least, up = (std::fabs(double(number)) - least) / unit;
      good &= unit > 0 && std::fabs(sum / n - std::fabs(double(number))) <= 4 * unit * std::sqrt(up * (1 - up) / n);
    }
  return good;
}

void check(const Conversions& isa, const char* name) {
  for (int parted : {0, 1}) {
    if (parted && &isa == &conversions) continue;  // without vectors, they are parted alike
    expect(parts_join(isa, parted), "%s joins the parts of numbers, parted %d", name, parted);
    expect(joins_whatever_was_written(isa, parted), "%s joins numbers written from outside, parted %d", name, parted);
  }
  const Format bf16("bfloat16", DType::bf16, 7), f16("float16", DType::f16, 10);
  expect(rounds_with_probability(bf16, isa.narrow_stochastically_bf16), "%s rounds to bfloat16 with random bits", name);
  expect(rounds_with_probability(f16, isa.narrow_stochastically_f16), "%s rounds to float16 with random bits", name);
  expect(draws_what_philox_says(isa), "%s draws random bits", name);
  expect(is_unbiased(isa), "%s rounds to the mean", name);
}

}  // namespace

void check_conversions() {
  expect(philox_is_known(), "%s", "the words of Philox 4x32-10");
  for (int i = 0; i < isa_count; i++) {
    if (!isas[i].supported()) continue;
#if defined(__x86_64__)
    check(i == 0 ? conversions : i == 1 ? conversions_avx2 : conversions_avx512, isas[i].name);
#else
    check(conversions, isas[i].name);
#endif
  }
  check<bfloat16>(Format("bfloat16", DType::bf16, 7));
  check<float16>(Format("float16", DType::f16, 10));
}
