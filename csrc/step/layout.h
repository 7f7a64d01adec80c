// Layouts of rows whose operands do not all walk memory in the same order: their dimensions, merged where all operands allow it.
#pragma once
#include <algorithm>
#include <array>

#include "counted.h"
#include "rows.h"

namespace fastopt {

// What a layout is made of: the sizes of a tensor and the strides of each operand, in elements; null where there is no such operand.
struct Strides {
  int ndim;
  const int64_t* sizes;
  const int64_t* of[max_operands];
};

class Layouts {
 public:
  void clear() { layouts.clear(), dims.clear(); }

  // The place of the layout of these operands; -1 if in the order of the parameter's strides element i of each is element i in memory.
  int64_t add(const Strides& strides) {
    by_stride.clear(), merged.clear();
    for (int d = 0; d < strides.ndim; d++)
      if (strides.sizes[d] > 1) by_stride.push_back(d);
    const int64_t* param = strides.of[0];
    std::stable_sort(by_stride.begin(), by_stride.end(), [&](int a, int b) { return param[a] > param[b]; });
    for (int d : by_stride) {
      Dim dim = {strides.sizes[d]};
      bool merge = !merged.empty();
      for (int k = 0; k < max_operands; k++) {
        dim[1 + k] = strides.of[k] ? strides.of[k][d] : 0;
        merge = merge && merged.back()[1 + k] == dim[1 + k] * dim[0];
      }
      if (merge) dim[0] *= merged.back()[0], merged.back() = dim;
      else merged.push_back(dim);
    }
    if (merged.empty()) return -1;
    bool linear = merged.size() == 1;
    for (int k = 0; k < max_operands; k++) linear = linear && (!strides.of[k] || merged[0][1 + k] == 1);
    if (linear) return -1;
    layouts.push_back({int(merged.size()), nullptr, {}});
    for (int field = 0; field < 1 + max_operands; field++)
      for (const Dim& dim : merged) dims.push_back(dim[field]);
    return int64_t(layouts.size()) - 1;
  }

  // Once all are there: before, what they point to may move.
  void finish() {
    const int64_t* at = dims.data();
    for (Layout& layout : layouts) {
      layout.sizes = at;
      for (int k = 0; k < max_operands; k++) layout.strides[k] = at + layout.ndim * (k + 1);
      at += layout.ndim * (1 + max_operands);
    }
  }
  const Layout* operator[](int64_t place) const { return place < 0 ? nullptr : &layouts[size_t(place)]; }

 private:
  using Dim = std::array<int64_t, 1 + max_operands>;   // size, stride of each operand
  Vec<Layout> layouts;
  Vec<int64_t> dims;
  Vec<int> by_stride;                                  // memory used again
  Vec<Dim> merged;
};

}  // namespace fastopt
