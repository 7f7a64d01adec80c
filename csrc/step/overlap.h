// Whether tensors share memory, so that rows must be stepped in turn.
#pragma once
#include <algorithm>

#include "counted.h"

namespace fastopt {

struct Extent { uintptr_t begin, end; bool written; };   // of a parameter or a gradient in memory

class Extents {
 public:
  void clear() { extents.clear(); }
  size_t add(const Extent& extent) { extents.push_back(extent); return extents.size() - 1; }
  Extent& operator[](size_t place) { return extents[place]; }

  // Whether one that is written shares memory with another. The order by address is kept from step to step.
  bool overlap() {
    if (!sorted()) {
      order.resize(extents.size());
      for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
      std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return extents[a].begin < extents[b].begin; });
    }
    uintptr_t reached = 0, written = 0;
    for (uint32_t i : order) {
      const Extent& extent = extents[i];
      if (extent.begin < (extent.written ? reached : written)) return true;
      reached = std::max(reached, extent.end);
      if (extent.written) written = std::max(written, extent.end);
    }
    return false;
  }

 private:
  bool sorted() const {
    if (order.size() != extents.size()) return false;
    for (size_t i = 1; i < order.size(); i++)
      if (extents[order[i - 1]].begin > extents[order[i]].begin) return false;
    return true;
  }
  Vec<Extent> extents;
  Vec<uint32_t> order;
};

}  // namespace fastopt
