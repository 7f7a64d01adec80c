// The traffic of one optimizer step with trivial arithmetic: what memory alone allows. bench/roof.py builds and calls it.
//
// It reads param, grad and every state slot and writes param and every slot, on the tensors of an optimizer that is being
// measured, so that placement and caches are the same. `zero` is 0 at run time, which the compiler cannot know: every value
// is loaded, combined and stored, and none changes. Threads share the work as the library's do: one region, equal
// contiguous parts cut on cache lines.
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t line = 64;

template <class Word, int slots>
void touch(const int64_t* row, int64_t begin, int64_t end, Word zero) {
  auto words = [&](int operand) { return reinterpret_cast<Word*>(row[operand] + begin); };
  Word* __restrict param = words(0);
  const Word* __restrict grad = words(1);
  Word* __restrict slot0 = words(2);
  Word* __restrict slot1 = words(3);
  Word* __restrict slot2 = words(4);
  for (int64_t i = 0, n = (end - begin) / int64_t(sizeof(Word)); i < n; i++) {
    Word mixed = grad[i];
    if constexpr (slots > 0) slot0[i] ^= mixed & zero, mixed ^= slot0[i];
    if constexpr (slots > 1) slot1[i] ^= mixed & zero, mixed ^= slot1[i];
    if constexpr (slots > 2) slot2[i] ^= mixed & zero, mixed ^= slot2[i];
    param[i] ^= mixed & zero;
  }
}

template <class Word, int slots>
void share(const int64_t* rows, const int64_t* ends, int64_t count, int64_t begin, int64_t end, int64_t zero) {
  for (int64_t r = std::upper_bound(ends, ends + count, begin) - ends; r < count; r++) {
    int64_t start = r ? ends[r - 1] : 0;
    if (start >= end) break;
    int64_t from = std::max(begin - start, int64_t(0)) / line * line;
    int64_t upto = end < ends[r] ? (end - start) / line * line : ends[r] - start;
    if (from < upto) touch<Word, slots>(rows + 5 * r, from, upto, Word(zero));
  }
}

template <class Word> auto share_of(int64_t slots) {
  constexpr decltype(&share<Word, 0>) of[] = {share<Word, 0>, share<Word, 1>, share<Word, 2>, share<Word, 3>};
  return of[slots];
}

}  // namespace

// rows: 5 addresses each (param, grad, slots; unused ones are not read); ends: bytes of one operand up to and with that row.
extern "C" void roof(const int64_t* rows, const int64_t* ends, int64_t count, int64_t slots, int64_t itemsize,
                     int64_t threads, int64_t zero) {
  auto part = itemsize == 2 ? share_of<uint16_t>(slots) : share_of<uint32_t>(slots);
  int64_t total = count ? ends[count - 1] : 0;
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; t++) part(rows, ends, count, total * t / threads, total * (t + 1) / threads, zero);
}
