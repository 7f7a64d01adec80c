// An update over n elements, one after the other in memory: of every dtype and set of slots, in vectors where there are some.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "passes.h"
#include "round.h"
#if defined(FASTOPT_VECTOR_BYTES)
#include "simd.h"
#endif

namespace fastopt {
namespace {

template <class Algorithm> constexpr bool reads_grad = !std::is_base_of_v<NoGrad, Algorithm>;

// Param and grad are of type P, state of type S, arithmetic is in T.
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

}  // namespace
}  // namespace fastopt
