// What the native tests count, and how densely they go through what is too much under a sanitizer or an emulator.
#pragma once
#include <atomic>
#include <cstddef>
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

// Conversions that no row runs as they are (conversions.h). Numbers and remainders [in order, even and odd elements apart].
struct Conversions {
  void (*part[2])(const float* from, uint16_t* numbers, int16_t* remainders, size_t n);
  void (*join[2])(const uint16_t* numbers, const int16_t* remainders, float* to, size_t n);
  void (*narrow_stochastically_bf16)(const float* from, const uint16_t* randoms, uint16_t* to, size_t n);
  void (*narrow_stochastically_f16)(const float* from, const uint16_t* randoms, uint16_t* to, size_t n);
  void (*draw)(uint64_t seed, uint64_t step, uint32_t position, int64_t begin, int64_t n, uint16_t* to);
};
extern const Conversions conversions_avx2, conversions_avx512;

void check_conversions();
void check_layouts();
void check_extents();
void check_images();
