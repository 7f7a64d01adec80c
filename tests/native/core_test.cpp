// The C++ core without torch or Python, for sanitizers and foreign processors: every update, mask of slots, dtype and layout, on every
// ISA and on 1, 2 and 3 threads, must leave the same bits. Prints one hash of them all, to compare between machines. Runs the tests of
// the other files too.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "checks.h"
#include "step/algorithms.h"
#include "step/isa.h"
#include "step/passes.h"
#include "step/philox.h"
#include "step/round.h"

using namespace fastopt;

// Mostly numbers near 1; sometimes zeros of both signs, subnormals, infinities and NaN.
static double random_value(bool special) {
  uint32_t kind = random_bits() % 64;
  double sign = random_bits() % 2 ? 1 : -1;
  if (special && kind < 6) {
    const double values[] = {0.0, 1e-41, random_bits() % 2 ? 1e-310 : 1e-30, random_bits() % 2 ? 6e-8 : 1e30, 1.0 / 0.0, 0.0 / 0.0};
    return sign * values[kind];
  }
  return sign * (1 + random_bits() * 0x1p-31) * (kind % 2 ? 1 : 0x1p-8);
}

static void put(void* data, DType dtype, int64_t i, double value) {
  float single = float(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == DType::f32) static_cast<float*>(data)[i] = single;
  else if (dtype == DType::f64) static_cast<double*>(data)[i] = value;
  else if (dtype == DType::bf16) static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
  else static_cast<uint16_t*>(data)[i] =
           uint16_t(bits >> 16 & 0x8000) | uint16_t(single != single ? 0x7e00 : single - single != 0 ? 0x7c00 : random_bits() & 0x3fff);
}

// The bits of an element, one value for all NaNs: their payload is the processor's choice.
static uint64_t canonical(const void* data, DType dtype, int64_t i) {
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(data) + i * itemsize(dtype), size_t(itemsize(dtype)));
  const uint64_t infinity = dtype == DType::f64 ? 0x7ff0000000000000u : dtype == DType::f32 ? 0x7f800000u : dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
  const uint64_t magnitude = bits & ~(uint64_t(1) << (8 * itemsize(dtype) - 1));
  return magnitude > infinity ? ~uint64_t(0) : bits;
}

// One set of tensors, each up to the end of its heap block, so that a sanitizer sees the first byte beyond.
struct Case {
  struct Tensor {
    std::unique_ptr<char[]> memory;
    char* data;
    DType dtype;
    int64_t extent;
  };
  std::vector<std::vector<Tensor>> tensors;
  std::vector<std::vector<double>> scalars;
  std::vector<std::vector<int64_t>> dims;
  std::vector<Layout> layouts;
  std::vector<Row> rows;
  std::vector<int64_t> ends;
};

struct Sizes { int64_t numel; bool strided; };

// Hyper-parameters of 0.3 to 0.6, which is lerp from both ends, sometimes 0 or 1, and rarely a NaN with every bit set.
template <class Scalars, class Hyper> static void put_scalars(void* out) {
  double numbers[sizeof(Hyper) / sizeof(double)];
  for (double& number : numbers) {
    const uint32_t kind = random_bits() % 64;
    number = kind < 16 ? 0 : kind < 20 ? 1 : (1 + random_bits() * 0x1p-31) * 0.3;
    if (kind == 20) std::memset(&number, 0xff, sizeof number);
  }
  Hyper hyper;
  std::memcpy(&hyper, numbers, sizeof hyper);
  new (out) Scalars(hyper, 5);
}

template <class O>
static Case make(int index, unsigned used, DType param, DType state, bool special, const std::vector<Sizes>& sizes, bool averaged = false,
                 bool companions = false) {
  Case c;
  int64_t work = 0;
  for (Sizes s : sizes) {
    Row row = {};
    row.algorithm = uint8_t(index), row.used = uint8_t(used), row.numel = s.numel;
    c.tensors.emplace_back();
    c.layouts.push_back({});
    c.dims.emplace_back();
    // strided: the parameter is [numel/3, 3] row by row, the others transposed, the gradient with every second element
    const int64_t outer = s.numel / 3;
    if (s.strided) c.dims.back() = {outer, 3, 3, 1, 2, 2 * outer, 1, outer, 1, outer, 1, outer, 1, outer, 1, outer};
    for (int k = 0; k < max_operands; k++) {
      if (k == 2 + companion_slot ? !companions : k == 2 + average_slot ? !averaged : k >= 2 && !(used >> (k - 2) & 1)) continue;
      Case::Tensor t;
      t.dtype = row.dtype[k] = k < 2 ? param : k == 2 + average_slot ? (itemsize(param) == 2 ? DType::f32 : param) :
                             k == 2 + companion_slot ? (param == DType::bf16 ? param : DType::f32) : state;
      t.extent = s.strided && k == 1 ? 2 * s.numel - 1 : s.numel;
      const int64_t size = t.extent * itemsize(t.dtype), offset = s.numel % 2 * (k + 1) * itemsize(t.dtype);  // not aligned to vectors
      t.memory.reset(new char[size_t(offset + size)]);
      t.data = t.memory.get() + offset;
      for (int64_t i = 0; i < t.extent; i++) {
        double value = random_value(special);
        put(t.data, t.dtype, i, k >= 2 ? value * value : value);
      }
      row.data[k] = t.data;
      c.tensors.back().push_back(std::move(t));
    }
    c.scalars.emplace_back(size_t(max_scalars));
    using Hyper = typename O::template Hyper<double>;
    if (param == DType::f64) put_scalars<typename O::template Scalars<double>, Hyper>(c.scalars.back().data());
    else put_scalars<typename O::template Scalars<float>, Hyper>(c.scalars.back().data());
    c.rows.push_back(row);
    c.ends.push_back(work += s.numel + row_cost);
  }
  for (size_t r = 0; r < c.rows.size(); r++) {
    c.rows[r].scalars = c.scalars[r].data();
    if (c.dims[r].empty()) continue;
    c.layouts[r] = {2, c.dims[r].data(), {}};
    for (int k = 0; k < max_operands; k++) c.layouts[r].strides[k] = c.dims[r].data() + 2 * (k + 1);
    c.rows[r].layout = &c.layouts[r];
  }
  return c;
}

static void run_on(const Isa& isa, const Case& c, int threads, const Stages& stages) {
  const int64_t total = c.ends.back();
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; t++)
    pool.emplace_back([&, t] { run(isa, c.rows.data(), c.ends.data(), c.rows.size(), total * t / threads, total * (t + 1) / threads, stages); });
  for (auto& thread : pool) thread.join();
}

static uint64_t hash_of(const Case& c, int but = -1) {
  uint64_t hash = 1469598103934665603u;
  for (auto& row : c.tensors)
    for (size_t k = 0; k < row.size(); k++)
      for (int64_t i = 0; int(k) != but && i < row[k].extent; i++) hash = (hash ^ canonical(row[k].data, row[k].dtype, i)) * 1099511628211u;
  return hash;
}


static uint64_t step(const Isa& isa, const Case& c, int threads) {
  for (int repeat = 0; repeat < 2; repeat++) run_on(isa, c, threads, {});
  return hash_of(c);
}

static uint64_t all = 0;

template <class O> static void check(int index) {
  std::vector<Sizes> sizes = {{0, false}, {1, false}, {7, false}, {64, false}, {517, false}, {1029, true}, {1, false}, {3000, false}, {3, true}};
  for (int64_t numel = 2; numel < 70; numel++) sizes.push_back({numel, false});
  const DType dtypes[][2] = {{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                             {DType::bf16, DType::f32}, {DType::f16, DType::f32}, {DType::f64, DType::f32}, {DType::f32, DType::bf16}};
  for (unsigned used = 0; used < 1u << sizeof(O::slots) / sizeof(char*); used++) {
    if ((used & O::required) != O::required) continue;
    for (auto& dtype : dtypes)
      for (bool special : {false, true}) {
        uint64_t expected = 0;
        for (int i = 0; i < isa_count; i++)
          for (int threads : {1, 2, 3}) {
            if (!isas[i].supported()) continue;
            random_state = 7;
            Case c = make<O>(index, used, dtype[0], dtype[1], special, sizes);
            uint64_t hash = step(isas[i], c, threads);
            if (!expected) expected = hash;
            expect(hash == expected, "%s used=%u dtypes %d/%d special=%d: %s on %d threads differs", O::name, used, int(dtype[0]), int(dtype[1]), special, isas[i].name, threads);
          }
        all = (all ^ expected) * 1099511628211u;
      }
  }
}

// What stages do to a case, as passes of their own over memory: first the gradients, then the update, then the averages.
static void run_apart(const Isa& isa, Case& c, const Stages& stages) {
  auto pass = [&](size_t algorithm, int written, int read, const void* f32, const void* f64) {
    std::vector<Row> rows = c.rows;
    std::vector<Layout> layouts = c.layouts;
    for (size_t r = 0; r < rows.size(); r++) {
      Row& row = rows[r];
      for (int k = 0; k < max_operands; k++) row.data[k] = nullptr;
      int at = 0;
      for (int k : {written, read}) {
        if (k >= 0) row.data[at] = c.rows[r].data[k], row.dtype[at] = c.rows[r].dtype[k], layouts[r].strides[at] = c.layouts[r].strides[k];
        at++;
      }
      row.algorithm = uint8_t(algorithm), row.used = 0, row.scalars = row.dtype[0] == DType::f64 ? f64 : f32;
      if (row.layout) row.layout = &layouts[r];
    }
    run(isa, rows.data(), c.ends.data(), rows.size(), 0, c.ends.back());
  };
  for (int i = 0; i < stages.factors; i++) {
    const Scale::Scalars<float> f32 = {float(stages.factor[i])};
    const Scale::Scalars<double> f64 = {stages.factor[i]};
    pass(pass_at<Scale>, 1, -1, &f32, &f64);
  }
  run_on(isa, c, 1, {});
  const Average::Scalars<float> f32(stages.average_weight);
  const Average::Scalars<double> f64(stages.average_weight);
  if (stages.averages) pass(pass_at<Average>, 2 + average_slot, 0, &f32, &f64);
}

// Stages of a step leave what passes around it leave, but the gradient as it was; on every ISA, however the work is cut.
template <class O> static void check_stages(int index) {
  const std::vector<Sizes> sizes = {{0, false}, {1, false}, {7, false}, {64, false}, {517, false}, {1029, true}, {3000, false}, {3, true}, {5000, false}};
  const DType dtypes[][2] = {{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                             {DType::bf16, DType::f32}, {DType::f16, DType::f32}, {DType::f64, DType::f32}, {DType::f32, DType::bf16}};
  const Stages combinations[] = {{1, {0.3, 0}, false, 0}, {2, {0.0625, 0.7}, false, 0}, {0, {}, true, 0.1}, {2, {0.3, 0.0 / 0.0}, true, 0.7}, {2, {0x1p-20, 0.9}, true, 1e-3}};
  const unsigned used = (1u << sizeof(O::slots) / sizeof(char*)) - 1;
  for (auto& dtype : dtypes)
    for (const Stages& stages : combinations)
      for (int i = 0; i < isa_count; i++) {
        if (!isas[i].supported()) continue;
        auto fresh = [&] { random_state = 7; return make<O>(index, used, dtype[0], dtype[1], true, sizes, stages.averages); };
        Case apart = fresh(), untouched = fresh();
        run_apart(isas[0], apart, stages);
        for (int threads : {1, 3}) {
          Case c = fresh();
          run_on(isas[i], c, threads, stages);
          expect(hash_of(c, 1) == hash_of(apart, 1), "%s with %d factors, average %d, dtypes %d/%d: %s on %d threads differs", O::name, stages.factors, stages.averages, int(dtype[0]), int(dtype[1]), isas[i].name, threads);
          bool same = true;
          for (size_t r = 0; r < c.rows.size(); r++)
            same &= !std::memcmp(c.tensors[r][1].data, untouched.tensors[r][1].data, size_t(c.tensors[r][1].extent * itemsize(dtype[0])));
          expect(same, "%s: stages change a gradient", O::name);
        }
      }
}

// Where element i of an operand is, counted in the order of the parameter's memory.
static int64_t place_of_element(const Row& row, int k, int64_t i) {
  return row.layout ? i / 3 * row.layout->strides[k][0] + i % 3 * row.layout->strides[k][1] : i;
}
static float value_of(const Row& row, int k, int64_t i) {
  const char* at = static_cast<const char*>(row.data[k]) + place_of_element(row, k, i) * itemsize(row.dtype[k]);
  float value;
  bfloat16 brain;
  float16 half;
  std::memcpy(&value, at, row.dtype[k] == DType::f32 ? 4 : 0);
  std::memcpy(&brain, at, 2), std::memcpy(&half, at, 2);
  return row.dtype[k] == DType::f32 ? value : row.dtype[k] == DType::bf16 ? widen(brain) : widen(half);
}
// The master of an element; a parameter of fp16 that is not it rounded is followed.
static float master_of(const Row& row, int64_t i) {
  constexpr int k = 2 + companion_slot;
  const float param = value_of(row, 0, i);
  if (row.dtype[0] == DType::bf16) {
    bfloat16 brain;
    int16_t remainder;
    narrow(param, brain);
    std::memcpy(&remainder, static_cast<const int16_t*>(row.data[k]) + place_of_element(row, k, i), 2);
    return join(brain, remainder);
  }
  float16 rounded;
  narrow(value_of(row, k, i), rounded);
  return bits_of(widen(rounded)) == bits_of(param) ? value_of(row, k, i) : param;
}
static bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// Parameters of 16 bits with companions are stepped as fp32 ones, and those with random bits too, and then rounded: on every ISA,
// however the work is cut.
template <class O> static void check_kept(int index) {
  const std::vector<Sizes> sizes = {{0, false}, {1, false}, {7, false}, {64, false}, {517, false}, {1029, true}, {3000, false}, {3, true}, {5000, false}};
  const DType dtypes[][2] = {{DType::bf16, DType::bf16}, {DType::bf16, DType::f32}, {DType::f16, DType::f16}, {DType::f16, DType::f32}};
  const unsigned used = (1u << sizeof(O::slots) / sizeof(char*)) - 1;
  for (auto& dtype : dtypes)
    for (const bool companions : {false, true})
      for (const int factors : {0, 2})
        for (int i = 0; i < isa_count; i++)
          for (int threads : {1, 3}) {
            if (!isas[i].supported()) continue;
            Stages stages = {factors, {0.3, 0.7}, companions, 0.1, false};
            auto fresh = [&] { random_state = 7; return make<O>(index, used, dtype[0], dtype[1], true, sizes, companions, companions); };
            Case c = fresh(), wide = fresh();
            std::vector<std::vector<float>> masters;
            for (size_t r = 0; r < c.rows.size(); r++) {
              Row& row = c.rows[r];
              row.draws = {7, 3, uint32_t(r)};
              if (companions && dtype[0] == DType::f16)     // of every third someone else wrote the number
                for (int64_t e = 0; e < row.numel; e++)
                  if (e % 3) static_cast<float*>(row.data[2 + companion_slot])[place_of_element(row, 2 + companion_slot, e)] = value_of(row, 0, e) * 1.0001f;
              masters.emplace_back(size_t(row.numel));
              for (int64_t e = 0; e < row.numel; e++) masters[r][size_t(e)] = companions ? master_of(row, e) : value_of(row, 0, e);
              wide.rows[r].data[0] = masters[r].data(), wide.rows[r].dtype[0] = DType::f32, wide.rows[r].data[2 + companion_slot] = nullptr;
            }
            run_on(isas[0], wide, 1, stages);
            stages.draws = !companions;
            run_on(isas[i], c, threads, stages);
            bool good = true;
            for (size_t r = 0; r < c.rows.size(); r++) {
              const Row& row = c.rows[r];
              std::vector<uint16_t> randoms(size_t(row.numel + 7));
              Randoms(7, 3, uint32_t(r)).draw(0, row.numel, randoms.data());
              for (int64_t e = 0; e < row.numel; e++) {
                const float expected = masters[r][size_t(e)];
                bfloat16 brain;
                float16 half;
                int16_t remainder;
                if (companions) part(expected, brain, remainder), narrow(expected, half);
                else narrow_stochastically(expected, randoms[size_t(e)], brain), narrow_stochastically(expected, randoms[size_t(e)], half);
                good &= same(value_of(row, 0, e), dtype[0] == DType::bf16 ? widen(brain) : widen(half));
                good &= !companions || same(master_of(row, e), expected);
                for (int k = 2; k < max_operands; k++)
                  good &= k == 2 + companion_slot || !row.data[k] || same(value_of(row, k, e), value_of(wide.rows[r], k, e));
              }
            }
            expect(good, "%s, 16-bit parameters %s, %d factors, dtypes %d/%d: %s on %d threads differs", O::name,
                   companions ? "with companions" : "and random bits", factors, int(dtype[0]), int(dtype[1]), isas[i].name, threads);
          }
}

template <class... O> static void check_all(std::tuple<O...>*) {
  int index = 0;
  (check<O>(index++), ...);
  index = 0;
  (check_stages<O>(index++), ...);
  index = 0;
  (check_kept<O>(index++), ...);
}

// A root divided by a known divisor must be the processor's division, for every mantissa, exponent and special value.
static void check_divisors() {
  for (double number : {1.0, 0.03, 0.31622776, 0.99999994, 0.50000006, 1.2e-9, 1.0 / 3, 1e-12, 0.0}) {
    Divisor<float> divisor;
    divisor = number;
    bool same = true;
    for (uint32_t i = 0; i < (1u << 23) + (1u << 16); i++) {
      const uint32_t bits = i < 1u << 23 ? 0x3f800000 | i : i << 16;  // all mantissas; all exponents, signs and a few mantissas
      float root;
      std::memcpy(&root, &bits, 4);
      if (root < 0 || (root > 0 && root < 0x1p-75f) || (root > 0x1p64f && root < INFINITY)) continue;  // no fp32 number's root
      const float quotient = divide_root(root, divisor), expected = root / divisor.value;
      same &= std::memcmp(&quotient, &expected, 4) == 0 || (quotient != quotient && expected != expected);
    }
    expect(same, "a root divided by %g differs", number);
  }
}

int main() {
  check_conversions();
  check_layouts();
  check_extents();
  check_images();
  check_divisors();
  check_all(static_cast<Algorithms*>(nullptr));
  std::printf("hash %016llx\n%d passed, %d failed\n", static_cast<unsigned long long>(all), cases - failures, int(failures));
  return failures != 0;
}
