// Reading passes: one number of each tile of a gradient, compiled once per ISA.
//
// Magnitudes are taken and squares made in fp64, exactly for all dtypes but fp64. Element i of a tile goes to lane i % 32, and lanes are
// added in pairs, whatever the instruction set: the same bits everywhere. Included by apply.h, whose loads it uses.
#pragma once

namespace fastopt {
namespace {

typedef double Doubles __attribute__((vector_size(64)));
typedef float Singles __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));

template <class To, class From> inline To bits_as(const From& from) { To to; std::memcpy(&to, &from, sizeof to); return to; }
inline Doubles eight(const double* from) { Doubles v; std::memcpy(&v, from, sizeof v); return v; }
inline Doubles eight(const float* from) { Singles v; std::memcpy(&v, from, sizeof v); return __builtin_convertvector(v, Doubles); }
inline Doubles eight(const bfloat16* from) {
  Shorts v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(bits_as<Singles>(__builtin_convertvector(v, Words) << 16), Doubles);
}

template <Norm norm, class V> inline V include(V sum, V value) {
  if constexpr (norm == Norm::squares) return sum + value * value;
  const V magnitude = value < 0 ? -value : value;
  if constexpr (norm == Norm::sum) return sum + magnitude;
  return sum != sum ? sum : sum > magnitude ? sum : magnitude;   // NaN wins
}
template <Norm norm, class V> inline V join(V a, V b) {
  if constexpr (norm == Norm::largest) return include<norm>(a, b);
  else return a + b;
}

template <Norm norm> class Lanes {
 public:
  // n elements; all but the last call of a tile with a multiple of 32.
  template <class S> void add(const S* from, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
      for (int k = 0; k < 4; k++) lane[k] = include<norm>(lane[k], eight(from + i + 8 * k));
    if (i == n) return;
    double rest[32];
    std::memcpy(rest, lane, sizeof rest);
    for (int j = 0; i < n; i++, j++) rest[j] = include<norm>(rest[j], double(widen(from[i])));
    std::memcpy(lane, rest, sizeof rest);
  }
  double result() const {
    const Doubles eight = join<norm>(join<norm>(lane[0], lane[2]), join<norm>(lane[1], lane[3]));
    double a[8];
    std::memcpy(a, &eight, sizeof a);
    for (int width = 4; width; width /= 2)
      for (int j = 0; j < width; j++) a[j] = join<norm>(a[j], a[j + width]);
    return a[0];
  }

 private:
  Doubles lane[4] = {};
};
template <Norm norm, class S> void reduce_row(const S* grad, const Layout* layout, int64_t begin, int64_t end, double* tiles) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  constexpr bool direct = !std::is_same_v<S, float16>;
  alignas(64) T loaded[block];
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t n = end - at < tile ? end - at : tile;
    Lanes<norm> lanes;
    if constexpr (direct)
      if (!layout) {
        lanes.add(grad + at, n);
        *tiles++ = lanes.result();
        continue;
      }
    for (int64_t done = 0; done < n; done += block) {
      const int64_t some = n - done < block ? n - done : block;
      for_runs(grad, layout, 1, at + done, some, [&](auto* from, int64_t i, int64_t run, int64_t stride) { load(loaded + i, from, run, stride); });
      lanes.add(loaded, some);
    }
    *tiles++ = lanes.result();
  }
}

void reduce(const Row& row, Norm norm, int64_t begin, int64_t end, double* tiles) {
  with_type(row.dtype[1], row.data[1], [&](const auto* grad) {
    if (norm == Norm::squares) reduce_row<Norm::squares>(grad, row.layout, begin, end, tiles);
    else if (norm == Norm::sum) reduce_row<Norm::sum>(grad, row.layout, begin, end, tiles);
    else reduce_row<Norm::largest>(grad, row.layout, begin, end, tiles);
  });
}

}  // namespace
}  // namespace fastopt
