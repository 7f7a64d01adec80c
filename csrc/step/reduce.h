// Reading passes: one number of each tile of a gradient, after its factors (Stages in rows.h). Compiled once per ISA.
//
// Magnitudes are taken and squares made in fp64, exactly for all dtypes but fp64. Element i of a tile goes to lane i % 32, and lanes are
// added in pairs, whatever the instruction set: the same bits everywhere.
#pragma once
#include "factors.h"

namespace fastopt {
namespace {

#if defined(FASTOPT_VECTOR_BYTES)
constexpr int wide = FASTOPT_VECTOR_BYTES;
#else
constexpr int wide = 16;
#endif
constexpr int tile_lanes = 32, together = wide / int(sizeof(double)), vectors = tile_lanes / together;
typedef double Doubles __attribute__((vector_size(wide)));
typedef int64_t Integers __attribute__((vector_size(wide)));
typedef float Singles __attribute__((vector_size(wide / 2)));

template <class To, class From> inline To bits_as(const From& from) { To to; std::memcpy(&to, &from, sizeof to); return to; }
inline Doubles doubles(const double* from) { Doubles v; std::memcpy(&v, from, sizeof v); return v; }
#if defined(FASTOPT_VECTOR_BYTES)
inline Doubles doubles(const float* from) { Singles v; std::memcpy(&v, from, sizeof v); return Doubles(to_doubles(v)); }
#else
inline Doubles doubles(const float* from) { Singles v; std::memcpy(&v, from, sizeof v); return __builtin_convertvector(v, Doubles); }
#endif

// V is double or Doubles, and I the integers of its size. Of magnitudes, which have no sign, the bits are in the order of the numbers, NaN
// being larger than all: so NaN wins, in whatever order.
template <Norm norm, class I, class V> inline V include(V sum, V value) {
  if constexpr (norm == Norm::squares) return sum + value * value;
  const V magnitude = bits_as<V>(bits_as<I>(value) & INT64_MAX);
  if constexpr (norm == Norm::sum) return sum + magnitude;
  return bits_as<I>(sum) > bits_as<I>(magnitude) ? sum : magnitude;
}

template <Norm norm> class Lanes {
 public:
  // n elements; all but the last call of a tile with a multiple of 32.
  template <class T> void add(const T* from, int64_t n) {
    int64_t i = 0;
    for (; i + tile_lanes <= n; i += tile_lanes)
      for (int k = 0; k < vectors; k++) lane[k] = include<norm, Integers>(lane[k], doubles(from + i + together * k));
    if (i == n) return;
    double rest[tile_lanes];
    std::memcpy(rest, lane, sizeof rest);
    for (int j = 0; i < n; i++, j++) rest[j] = include<norm, int64_t>(rest[j], double(from[i]));
    std::memcpy(lane, rest, sizeof rest);
  }
  double result() const {
    Doubles sums[vectors];
    std::memcpy(sums, lane, sizeof sums);
    for (int width = vectors / 2; width; width /= 2)
      for (int k = 0; k < width; k++) sums[k] = joined<Integers>(sums[k], sums[k + width]);
    double last[together];
    std::memcpy(last, sums, sizeof last);
    for (int width = together / 2; width; width /= 2)
      for (int j = 0; j < width; j++) last[j] = joined<int64_t>(last[j], last[j + width]);
    return last[0];
  }

 private:
  template <class I, class V> static inline V joined(V a, V b) { return norm == Norm::largest ? include<norm, I>(a, b) : a + b; }
  Doubles lane[vectors] = {};
};

template <Norm norm, class S> void reduce_row(const Row& row, const Stages& stages, int64_t begin, int64_t end, double* tiles) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  constexpr bool direct = std::is_same_v<S, T>;
  const S* const grad = static_cast<const S*>(row.data[1]);
  alignas(64) T loaded[block];
  alignas(64) S scaled[block];
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t n = end - at < tile ? end - at : tile;
    Lanes<norm> lanes;
    if constexpr (direct)
      if (!row.layout && !stages.factors) {
        lanes.add(grad + at, n);
        *tiles++ = lanes.result();
        continue;
      }
    for (int64_t done = 0; done < n; done += block) {
      const int64_t some = n - done < block ? n - done : block;
      if (stages.factors) scale_gradient(row, at + done, some, end - at - done, stages, scaled);
      if constexpr (direct)
        if (stages.factors) {
          lanes.add(scaled, some);
          continue;
        }
      if (stages.factors) load(loaded, scaled, some, 1);
      else load_operand(row, 1, at + done, some, loaded);
      lanes.add(loaded, some);
    }
    *tiles++ = lanes.result();
  }
}

void reduce(const Row& row, Norm norm, const Stages& stages, int64_t begin, int64_t end, double* tiles) {
  with_type(row.dtype[1], row.data[1], [&](auto* grad) {
    using S = std::remove_reference_t<decltype(*grad)>;
    if (norm == Norm::squares) reduce_row<Norm::squares, S>(row, stages, begin, end, tiles);
    else if (norm == Norm::sum) reduce_row<Norm::sum, S>(row, stages, begin, end, tiles);
    else reduce_row<Norm::largest, S>(row, stages, begin, end, tiles);
  });
}

}  // namespace
}  // namespace fastopt
