// What the native tests count, and how densely they go through what is too much under a sanitizer or an emulator.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>

// Of exhaustive tests over 2^32 patterns: every so manieth, and all those around which the result changes. The Makefile sets it.
#ifndef STRIDE
#define STRIDE 1
#endif

inline std::atomic<int> failures{0}, cases{0};

// Counts a case; prints what failed, in printf's format.
template <class... Args> void expect(bool good, const char* format, Args... args) {
  cases++;
  if (good) return;
  failures++;
  std::printf(format, args...);
  std::printf("\n");
}

inline uint64_t random_state = 1;
inline uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 33);
}
inline int64_t random_below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

void check_conversions();
void check_layouts();
void check_extents();
void check_images();
