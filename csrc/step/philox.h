// Random bits for rounding: Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), which makes four words
// of a key and a counter. They are a function of what is rounded where, so they are the same for any number of threads, on every device,
// and after a checkpoint.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(FASTOPT_VECTOR_BYTES)
#include "simd.h"
#endif

namespace fastopt {
namespace {

inline uint64_t product(uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }

// Writes four words over a counter; over many, where Wide is a vector. They lie in 64 bits each, whose upper halves are left as they come.
template <class Wide> inline void philox(Wide (&words)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++, key0 += 0x9e3779b9, key1 += 0xbb67ae85) {
    const Wide a = product(words[0], 0xd2511f53), b = product(words[2], 0xcd9e8d57);
    words[0] = b >> 32 ^ words[1] ^ key0, words[1] = b;
    words[2] = a >> 32 ^ words[3] ^ key1, words[3] = a;
  }
}

// The bits of one tensor at one step: 16 for each element, by its index. Other seeds, steps up to 2^48, positions (of parameters in
// their optimizer) and elements up to 2^51 have others.
struct Randoms {
  uint32_t key[2], counter[3];                    // of the counter, all but the lowest word

  Randoms(uint64_t seed, uint64_t step, uint32_t position)
      : key{uint32_t(seed), uint32_t(seed >> 32)}, counter{uint32_t(step >> 32) << 16, uint32_t(step), position} {}

  // Of elements [begin, begin + n), begin a multiple of 8: one counter's words, from the lowest bits of the first on. Writes those of as
  // many more as there are to a multiple of 8.
  void draw(int64_t begin, int64_t n, uint16_t* to) const {
    int64_t block = begin / 8, end = (begin + n + 7) / 8;
#if defined(FASTOPT_VECTOR_BYTES)
    for (constexpr int wide = sizeof(Wides) / 8; block + wide <= end; block += wide, to += 8 * wide) draw<Wides>(block, to);
#endif
    for (; block < end; block++, to += 8) draw<uint64_t>(block, to);
  }

 private:
  template <class Wide> void draw(int64_t block, uint16_t* to) const {
    constexpr int wide = sizeof(Wide) / 8;
    uint64_t low[wide], high[wide], out[wide][2];
    for (int i = 0; i < wide; i++) low[i] = uint64_t(block + i), high[i] = counter[0] + (uint64_t(block + i) >> 32);
    Wide words[4] = {Wide{}, Wide{}, Wide{} + counter[1], Wide{} + counter[2]};
    std::memcpy(&words[0], low, sizeof low), std::memcpy(&words[1], high, sizeof high);
    philox(words, key[0], key[1]);
    const Wide first = (words[0] & 0xffffffff) | words[1] << 32, second = (words[2] & 0xffffffff) | words[3] << 32;
    std::memcpy(low, &first, sizeof low), std::memcpy(high, &second, sizeof high);
    for (int i = 0; i < wide; i++) out[i][0] = low[i], out[i][1] = high[i];
    std::memcpy(to, out, sizeof out);
  }
};

}  // namespace
}  // namespace fastopt
