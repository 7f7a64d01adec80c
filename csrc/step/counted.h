// A vector whose allocations are counted: tests assert that a hot step makes none.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace fastopt {

inline int64_t allocations = 0;

template <class T> struct Counted {
  using value_type = T;
  Counted() = default;
  template <class U> Counted(const Counted<U>&) {}
  T* allocate(size_t n) { allocations++; return std::allocator<T>().allocate(n); }
  void deallocate(T* p, size_t n) { std::allocator<T>().deallocate(p, n); }
  template <class U> bool operator==(const Counted<U>&) const { return true; }
  template <class U> bool operator!=(const Counted<U>&) const { return false; }
};
template <class T> using Vec = std::vector<T, Counted<T>>;

}  // namespace fastopt
