// The machinery of the CPU step, compiled once per ISA: an update over the elements of a row, with what a step does beside it.
//
// Where all operands walk memory in one order and are of dtypes in a usual combination, the update runs on memory itself. Else it runs
// on blocks in the L1 cache: operands are loaded (widened, gathered), updated, and param and state stored (rounded, scattered). What a
// step does beside the update (Stages in rows.h) is done to a block as well, before and after it.
// Everything has internal linkage: code for one ISA must never be shared with another.
#pragma once
#include <optional>

#include "companions.h"
#include "factors.h"

namespace fastopt {
namespace {

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
