// The machinery of the CPU step, compiled once per ISA: an update over the elements of a row, whatever their dtypes and strides.
//
// Where all operands walk memory in one order and are of dtypes in a usual combination, the update runs on memory itself. Else it runs
// on blocks in the L1 cache: operands are loaded (widened, gathered), updated, and param and state stored (rounded, scattered). What a
// step does beside the update (Stages in rows.h) is done to a block as well, before and after it.
// Everything has internal linkage: code for one ISA must never be shared with another.
#pragma once
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "companions.h"
#include "isa.h"
#include "passes.h"
#include "round.h"
#if defined(FASTOPT_VECTOR_BYTES)
#include "simd.h"
#endif

namespace fastopt {
namespace {

constexpr int64_t block = 512;

template <class Algorithm> constexpr bool reads_grad = !std::is_base_of_v<NoGrad, Algorithm>;

// ---- load and store of n elements, stride apart

template <class T, class S> inline void load(T* __restrict to, const S* __restrict from, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; i++) to[i] = T(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = T(widen(from[i * stride]));
  }
}
template <class T, class S> inline void store(const T* __restrict from, S* __restrict to, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i * stride]);
  }
}
#if defined(FASTOPT_VECTOR_BYTES)
template <> inline void load(float* __restrict to, const float16* __restrict from, int64_t n, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= n; i += lanes) write(from_half(read<Halves>(from + i)), to + i);
  for (; i < n; i++) to[i] = widen(from[i * stride]);
}
template <> inline void store(const float* __restrict from, float16* __restrict to, int64_t n, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + lanes <= n; i += lanes) write(to_half(read<Vector>(from + i)), to + i);
  for (; i < n; i++) narrow(from[i], to[i * stride]);
}
#endif

// Calls f(memory, position in the block, n, stride) for the runs of elements [begin, begin + n) of an operand.
template <class S, class F>
inline void for_runs(S* data, const Layout* layout, int operand, int64_t begin, int64_t n, F f) {
  if (!layout) return f(data + begin, 0, n, 1);
  const int64_t *sizes = layout->sizes, *strides = layout->strides[operand];
  const int inner = layout->ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = begin + done, offset = 0, first = rest % sizes[inner];
    rest /= sizes[inner];
    for (int d = inner - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * strides[d];
    int64_t run = sizes[inner] - first < n - done ? sizes[inner] - first : n - done;
    f(data + offset + first * strides[inner], done, run, strides[inner]);
    done += run;
  }
}

template <class T> constexpr DType held_as = DType::f32;
template <> constexpr DType held_as<double> = DType::f64;
template <> constexpr DType held_as<bfloat16> = DType::bf16;
template <> constexpr DType held_as<float16> = DType::f16;
template <class F> inline void with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(data));
    case DType::f64: return f(static_cast<double*>(data));
    case DType::bf16: return f(static_cast<bfloat16*>(data));
    case DType::f16: return f(static_cast<float16*>(data));
  }
}

// ---- an update over n elements: param and grad of type P, state of type S, arithmetic in T
//
// Beside a bf16 parameter may lie B: its remainders, int16_t, or random bits for its rounding, const uint16_t; else B is void.

constexpr int updated = 2 + max_slots;            // operands of an update: param, grad, slots; behind them what lies beside the parameter

template <class B> constexpr bool is_remainder = std::is_same_v<B, int16_t>;
template <class T, class P, class B> inline T load_param(const P* param, const B* beside, int64_t i) {
  if constexpr (is_remainder<B>) return join(param[i], beside[i]);
  else return widen(param[i]);
}
template <class T, class P, class B> inline void store_param(T value, P* param, B* beside, int64_t i) {
  if constexpr (is_remainder<B>) part(value, param[i], beside[i]);
  else if constexpr (!std::is_void_v<B>) narrow_stochastically(value, beside[i], param[i]);
  else narrow(value, param[i]);
}

#if defined(FASTOPT_VECTOR_BYTES)
// bf16 is split where all operands are. What is NaN there was read from bf16 or made by the processor, or is a scalar: see below.
template <class P, class S> constexpr bool split = std::is_same_v<P, bfloat16> && std::is_same_v<S, bfloat16>;

// The processor fetches ahead by itself, but not into the next page, and an update is so long that it sees the next loads late.
constexpr int64_t ahead = 2048;  // bytes
template <class S> inline void fetch_ahead(const S* from) {
  for (size_t at = 0; at < 2 * lanes * sizeof(S); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead + at);
}

// Element i and those after it that fill a pair of vectors.
template <class Algorithm, unsigned used, class P, class S, class B, class H>
inline void update_pair(P* param, const P* grad, S* const* slots, [[maybe_unused]] B* beside, int64_t i, const H& h) {
  Floats p[2], g[2], state[2][max_slots];
  if constexpr (is_remainder<B>) load<split<P, S>>(p[0], p[1], param + i, beside + i);
  else load<split<P, S>>(p[0], p[1], param + i);
  if constexpr (reads_grad<Algorithm>) load<split<P, S>>(g[0], g[1], grad + i);
  for (int k = 0; k < max_slots; k++)
    if (used >> k & 1) load<split<P, S>>(state[0][k], state[1][k], slots[k] + i);
  for (int half : {0, 1}) Algorithm::template update<used>(p[half], g[half], state[half], h);
  if constexpr (std::is_void_v<B>) store<split<P, S>>(p[0], p[1], param + i);
  else store<split<P, S>>(p[0], p[1], param + i, beside + i);
  for (int k = 0; k < max_slots; k++)
    if (used >> k & 1) store<split<P, S>>(state[0][k], state[1][k], slots[k] + i);
}

// As many of n elements as fill pairs; returns their number. In memory `rest` elements, n or more, are to be updated.
template <class Algorithm, unsigned used, class P, class S, class B, class H>
inline int64_t update_pairs(P* param, const P* grad, S* const* slots, B* beside, int64_t n, int64_t rest, H h) {
  if constexpr (split<P, S>)  // no NaN with bits that rounding could carry over
    for (float& number : reinterpret_cast<float(&)[sizeof h / sizeof(float)]>(h)) number = number == number ? number : NAN;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    if (i + ahead / int64_t(sizeof(P)) < rest) {
      fetch_ahead(param + i);
      if constexpr (reads_grad<Algorithm>) fetch_ahead(grad + i);
      for (int k = 0; k < max_slots; k++)
        if (used >> k & 1) fetch_ahead(slots[k] + i);
      if constexpr (is_remainder<B>) fetch_ahead(beside + i);
    }
    update_pair<Algorithm, used>(param, grad, slots, beside, i, h);
  }
  return i;
}
#endif

template <class Algorithm, unsigned used, class T, class P, class S, class B = void>
#if !defined(FASTOPT_VECTOR_BYTES)
[[gnu::flatten]]  // a loop with a call, which the compiler prefers for long updates, has no vectors
#endif
void update(void* const* data, int64_t n, [[maybe_unused]] int64_t rest, const void* scalars) {
  const auto h = *static_cast<const typename Algorithm::template Scalars<T>*>(scalars);
  P* __restrict param = static_cast<P*>(data[0]);
  const P* __restrict grad = static_cast<const P*>(data[1]);
  S* __restrict slot0 = static_cast<S*>(data[2]);
  S* __restrict slot1 = static_cast<S*>(data[3]);
  S* __restrict slot2 = static_cast<S*>(data[4]);
  B* __restrict beside = nullptr;
  if constexpr (!std::is_void_v<B>) beside = static_cast<B*>(data[updated]);
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  S* const slots[] = {slot0, slot1, slot2};
  if constexpr (std::is_same_v<T, float>) i = update_pairs<Algorithm, used>(param, grad, slots, beside, n, rest, h);
#endif
  for (; i < n; i++) {
    T p = load_param<T>(param, beside, i), g = {}, state[max_slots] = {};
    if constexpr (reads_grad<Algorithm>) g = widen(grad[i]);
    if constexpr (used & 1) state[0] = widen(slot0[i]);
    if constexpr (used & 2) state[1] = widen(slot1[i]);
    if constexpr (used & 4) state[2] = widen(slot2[i]);
    Algorithm::template update<used>(p, g, state, h);
    store_param(p, param, beside, i);
    if constexpr (used & 1) narrow(state[0], slot0[i]);
    if constexpr (used & 2) narrow(state[1], slot1[i]);
    if constexpr (used & 4) narrow(state[2], slot2[i]);
  }
}

using Update = void (*)(void* const* data, int64_t n, int64_t rest, const void* scalars);
struct Updates { Update of[1 << max_slots]; };  // by mask of used slots

// Whether the options of an algorithm can call for these slots; a pass has none.
template <class Algorithm, class... Of> constexpr bool can_use(unsigned used, std::tuple<Of...>*) {
  if constexpr ((std::is_same_v<Algorithm, Of> || ...)) return used == 0;
  else return (used >> sizeof(Algorithm::slots) / sizeof(char*)) == 0 && (used & Algorithm::required) == Algorithm::required;
}
template <class Algorithm, unsigned used, class... Types> constexpr Update update_or_null() {
  if constexpr (can_use<Algorithm>(used, static_cast<Passes*>(nullptr))) return &update<Algorithm, used, Types...>;
  else return nullptr;
}
template <class Algorithm, class... Types, unsigned... used>
constexpr Updates updates_of(std::integer_sequence<unsigned, used...>) {
  return {{update_or_null<Algorithm, used, Types...>()...}};
}
template <class T, class P, class S, class B, class... Algorithm>
Update find_update(const Row& row, std::tuple<Algorithm...>*) {
  static constexpr Updates updates[] = {updates_of<Algorithm, T, P, S, B>(std::make_integer_sequence<unsigned, 1 << max_slots>())...};
  return updates[row.algorithm].of[row.used];
}
template <class T, class P, class S> Update find_update(const Row& row) {
  return find_update<T, P, S, void>(row, static_cast<decltype(std::tuple_cat(Algorithms(), Passes()))*>(nullptr));
}
template <class T, class P, class S, class B> Update find_update(const Row& row) {   // for no pass
  return find_update<T, P, S, B>(row, static_cast<Algorithms*>(nullptr));
}

// ---- gradients multiplied

template <class T, class P> inline void scale(const P* __restrict from, P* __restrict to, int64_t n, [[maybe_unused]] int64_t rest, T factor) {
  int64_t i = 0;
#if defined(FASTOPT_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, float>) {
    if (factor != factor) factor = NAN;           // no bits that rounding could carry over
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      if (i + ahead / int64_t(sizeof(P)) < rest) fetch_ahead(from + i);
      Floats a, b;
      load<split<P, P>>(a, b, from + i);
      store<split<P, P>>(a * Floats(factor), b * Floats(factor), to + i);
    }
  }
#endif
  for (; i < n; i++) narrow(T(widen(from[i])) * factor, to[i]);
}

// n elements of a block, after all factors.
template <class P> inline void scale_all(const P* from, P* to, int64_t n, int64_t rest, const Stages& stages) {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  alignas(64) P once[block];
  scale(from, stages.factors == 1 ? to : once, n, rest, T(stages.factor[0]));
  if (stages.factors == 2) scale(once, to, n, n, T(stages.factor[1]));
}

// ---- elements [begin, end) of a row

constexpr int companion = 2 + companion_slot;

// The update that runs on memory itself, or null.
Update find_direct(const Row& row, bool draws) {
  if (row.layout) return nullptr;
  const DType param = row.dtype[0];
  if (row.data[1] && row.dtype[1] != param) return nullptr;
  DType state = param;
  for (int k = 2, first = 1; k < updated; k++) {
    if (!row.data[k]) continue;
    if (!first && row.dtype[k] != state) return nullptr;
    state = row.dtype[k], first = 0;
  }
  Update found = nullptr;
  with_type(param, nullptr, [&](auto* of_param) {
    with_type(state, nullptr, [&](auto* of_state) {
      using P = std::remove_pointer_t<decltype(of_param)>;
      using S = std::remove_pointer_t<decltype(of_state)>;
      using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
      if constexpr (std::is_same_v<P, bfloat16> && runs_directly(held_as<P>, held_as<S>)) {
        if (row.data[companion]) found = find_update<T, P, S, int16_t>(row);
        else if (draws) found = find_update<T, P, S, const uint16_t>(row);
        else found = find_update<T, P, S>(row);
      } else if constexpr (runs_directly(held_as<P>, held_as<S>)) {
        if (!row.data[companion] && !draws) found = find_update<T, P, S>(row);
      }
    });
  });
  return found;
}

// `grad`: of these elements, if it is not the row's; `randoms`: for these elements, if the update takes some.
void apply_directly(Update update, const Row& row, int64_t at, int64_t n, int64_t rest, void* grad, void* randoms) {
  void* data[updated + 1] = {};
  for (int k = 0; k < updated; k++)
    if (row.data[k]) data[k] = static_cast<char*>(row.data[k]) + at * itemsize(row.dtype[k]);
  if (grad) data[1] = grad;
  data[updated] = row.data[companion] ? static_cast<char*>(row.data[companion]) + at * itemsize(row.dtype[companion]) : randoms;
  update(data, n, rest, row.scalars);
}

// Elements [at, at + n) of an operand, one after the other: where they lie, or in a block.
template <class S> S* in_order(const Row& row, int k, int64_t at, S* block) { return row.layout ? block : static_cast<S*>(row.data[k]) + at; }
template <class S> void gather(const Row& row, int k, int64_t at, int64_t n, S* to) {
  if (!row.layout) return;
  for_runs(static_cast<const S*>(row.data[k]), row.layout, k, at, n, [&](const S* from, int64_t i, int64_t run, int64_t stride) {
    for (int64_t j = 0; j < run; j++) to[i + j] = from[j * stride];
  });
}
template <class S> void scatter(const S* from, const Row& row, int k, int64_t at, int64_t n) {
  if (!row.layout) return;
  for_runs(static_cast<S*>(row.data[k]), row.layout, k, at, n, [&](S* to, int64_t i, int64_t run, int64_t stride) {
    for (int64_t j = 0; j < run; j++) to[j * stride] = from[i + j];
  });
}

// n elements of the gradient, at most a block, after all factors and in its own dtype; in memory `rest` elements, n or more, are to be read.
template <class S> void scale_gradient(const Row& row, int64_t at, int64_t n, int64_t rest, const Stages& stages, S* to) {
  alignas(64) S gathered[block];
  gather(row, 1, at, n, gathered);
  scale_all(in_order(row, 1, at, gathered), to, n, row.layout ? n : rest, stages);
}

// The masters of a parameter S with companion C.
template <class S, class C> void load_masters(const Row& row, int64_t at, int64_t n, float* to) {
  alignas(64) S numbers[block];
  alignas(64) C companions[block];
  gather(row, 0, at, n, numbers), gather(row, companion, at, n, companions);
  load_masters(to, in_order(row, 0, at, numbers), in_order(row, companion, at, companions), n);
}
template <class S, class C> void store_masters(const float* from, const Row& row, int64_t at, int64_t n) {
  alignas(64) S numbers[block];
  alignas(64) C companions[block];
  store_masters(from, in_order(row, 0, at, numbers), in_order(row, companion, at, companions), n);
  scatter(numbers, row, 0, at, n), scatter(companions, row, companion, at, n);
}
void load_masters(const Row& row, int64_t at, int64_t n, float* to) {
  if (row.dtype[0] == DType::bf16) load_masters<bfloat16, int16_t>(row, at, n, to);
  else load_masters<float16, float>(row, at, n, to);
}
void store_masters(const float* from, const Row& row, int64_t at, int64_t n) {
  if (row.dtype[0] == DType::bf16) store_masters<bfloat16, int16_t>(from, row, at, n);
  else store_masters<float16, float>(from, row, at, n);
}

template <class S> void store_stochastically(const float* from, const Row& row, int64_t at, int64_t n) {
  alignas(64) uint16_t randoms[block];
  alignas(64) S numbers[block];
  Randoms(row.draws.seed, row.draws.step, row.draws.position).draw(at, n, randoms);
  store_stochastically(from, in_order(row, 0, at, numbers), randoms, n);
  scatter(numbers, row, 0, at, n);
}

template <class T> void load_operand(const Row& row, int k, int64_t at, int64_t n, T* to) {
  with_type(row.dtype[k], row.data[k], [&](auto* memory) {
    for_runs(memory, row.layout, k, at, n, [&](auto* from, int64_t i, int64_t run, int64_t stride) { load(to + i, from, run, stride); });
  });
}
template <class T> void store_operand(const T* from, const Row& row, int k, int64_t at, int64_t n) {
  with_type(row.dtype[k], row.data[k], [&](auto* memory) {
    for_runs(memory, row.layout, k, at, n, [&](auto* to, int64_t i, int64_t run, int64_t stride) { store(from + i, to, run, stride); });
  });
}

// The running average of n masters, at most a block.
void average_masters(const Row& row, int64_t at, int64_t n, double weight) {
  constexpr int average = 2 + average_slot;
  const Average::Scalars<float> scalars(weight);
  alignas(64) float averages[block], masters[block];
  load_operand(row, average, at, n, averages), load_masters(row, at, n, masters);
  void* data[updated] = {averages, masters};
  update<Average, 0, float, float, float>(data, n, n, &scalars);
  store_operand(averages, row, average, at, n);
}

template <class T> void apply_in_blocks(const Row& row, const Stages& stages, int64_t begin, int64_t end, DType compute) {
  const Update update = find_update<T, T, T>(row);
  const bool scales = stages.factors && row.data[1];
  const bool has_masters = row.data[companion], draws = stages.draws && itemsize(row.dtype[0]) == 2;
  void* data[updated] = {};
  alignas(64) T blocks[updated][block];
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = end - at < block ? end - at : block;
    for (int k = 0; k < updated; k++) {
      if (!row.data[k]) continue;
      if (k == 1 && scales) {
        data[1] = blocks[1];
        with_type(row.dtype[1], row.data[1], [&](auto* memory) {
          alignas(64) std::remove_reference_t<decltype(*memory)> scaled[block];
          scale_gradient(row, at, n, end - at, stages, scaled);
          load(blocks[1], scaled, n, 1);
        });
        continue;
      }
      if (!row.layout && row.dtype[k] == compute) {
        data[k] = static_cast<T*>(row.data[k]) + at;
        continue;
      }
      data[k] = blocks[k];
      if constexpr (std::is_same_v<T, float>)
        if (k == 0 && has_masters) {
          load_masters(row, at, n, blocks[0]);
          continue;
        }
      load_operand(row, k, at, n, blocks[k]);
    }
    update(data, n, n, row.scalars);
    for (int k = 0; k < updated; k++) {
      if (k == 1 || data[k] != blocks[k]) continue;
      if constexpr (std::is_same_v<T, float>)
        if (k == 0 && (has_masters || draws)) {
          if (has_masters) store_masters(blocks[0], row, at, n);
          else if (row.dtype[0] == DType::bf16) store_stochastically<bfloat16>(blocks[0], row, at, n);
          else store_stochastically<float16>(blocks[0], row, at, n);
          continue;
        }
      store_operand(blocks[k], row, k, at, n);
    }
  }
}

void apply(const Row& row, const Stages& stages, int64_t begin, int64_t end);

// A row whose gradient's last factor is part of the sign, with which its scalars begin: for a gradient in the compute type, where an
// update multiplies by it anyway, and where a product with 1 or -1 rounds nothing.
class FactorInSign {
 public:
  FactorInSign(const Row& of, const Stages& all) : row(of), stages(all) {
    std::memcpy(&scalars, of.scalars, sizeof scalars);
    const double factor = stages.factor[--stages.factors];
    if (computes_in_f64(row.dtype[0])) multiply<double>(factor);
    else multiply<float>(factor);
    row.scalars = &scalars;
  }
  static bool fits(const Row& row, const Stages& stages) {
    return stages.factors && row.data[1] && row.dtype[1] == (computes_in_f64(row.dtype[0]) ? DType::f64 : DType::f32);
  }

  Row row;
  Stages stages;

 private:
  template <class T> void multiply(double factor) {
    T sign;
    std::memcpy(&sign, &scalars, sizeof sign);
    sign *= T(factor);
    std::memcpy(&scalars, &sign, sizeof sign);
  }
  AnyScalars scalars;
};

// The parameter's running average, as a row of the pass that makes it.
class AverageRow {
 public:
  AverageRow(const Row& of, double weight) : scalars32(weight), scalars64(weight) {
    row = of;
    const int operands[] = {2 + average_slot, 0};
    for (int k = 0; k < max_operands; k++) row.data[k] = k < 2 ? of.data[operands[k]] : nullptr;
    for (int k : {0, 1}) row.dtype[k] = of.dtype[operands[k]];
    row.algorithm = uint8_t(pass_at<Average>), row.used = 0;
    row.scalars = computes_in_f64(row.dtype[0]) ? static_cast<const void*>(&scalars64) : &scalars32;
    if (!of.layout) return;
    layout = *of.layout;
    for (int k : {0, 1}) layout.strides[k] = of.layout->strides[operands[k]];
    row.layout = &layout;
  }
  void run(int64_t begin, int64_t end) const { apply(row, {}, begin, end); }

 private:
  Row row;
  Layout layout;
  Average::Scalars<float> scalars32;
  Average::Scalars<double> scalars64;
};

void apply_stages(const Row& row, const Stages& stages, int64_t begin, int64_t end) {
  const bool draws = stages.draws && itemsize(row.dtype[0]) == 2;
  const Update direct = find_direct(row, draws);
  const bool scales = stages.factors && row.data[1], averages = stages.averages && row.data[2 + average_slot];
  auto update = [&](int64_t at, int64_t n) {
    if (!direct && row.dtype[0] == DType::f64) return apply_in_blocks<double>(row, stages, at, at + n, DType::f64);
    if (!direct) return apply_in_blocks<float>(row, stages, at, at + n, DType::f32);
    alignas(64) uint16_t randoms[block];
    if (draws) Randoms(row.draws.seed, row.draws.step, row.draws.position).draw(at, n, randoms);
    if (!scales) return apply_directly(direct, row, at, n, end - at, nullptr, randoms);
    with_type(row.dtype[1], row.data[1], [&](auto* grad) {
      alignas(64) std::remove_reference_t<decltype(*grad)> scaled[block];
      scale_gradient(row, at, n, end - at, stages, scaled);
      apply_directly(direct, row, at, n, end - at, scaled, randoms);
    });
  };
  if (!averages && !(direct && (scales || draws))) return update(begin, end - begin);
  std::optional<AverageRow> average;
  if (averages && !row.data[companion]) average.emplace(row, stages.average_weight);
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = end - at < block ? end - at : block;
    update(at, n);
    if (average) average->run(at, at + n);
    else if (averages) average_masters(row, at, n, stages.average_weight);
  }
}

void apply(const Row& row, const Stages& stages, int64_t begin, int64_t end) {
  if (!FactorInSign::fits(row, stages)) return apply_stages(row, stages, begin, end);
  const FactorInSign own(row, stages);
  apply_stages(own.row, own.stages, begin, end);
}

}  // namespace
}  // namespace fastopt

#include "reduce.h"
