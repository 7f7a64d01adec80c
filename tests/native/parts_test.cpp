// What a step is made of beside its arithmetic, each part against the simplest program that does the same: layouts, overlaps, and the
// images of the GPU with what is uploaded of them.
#include <algorithm>
#include <thread>
#include <vector>

#include "checks.h"
#include "step/image.h"
#include "step/layout.h"
#include "step/overlap.h"

using namespace fastopt;

// ---- layouts

namespace {

// Strides of a tensor whose dimensions lie in memory in a random order, now and then with gaps between their steps.
std::vector<int64_t> random_strides(const std::vector<int64_t>& sizes) {
  std::vector<int> order;
  for (size_t d = 0; d < sizes.size(); d++) order.insert(order.begin() + random_below(int64_t(d) + 1), int(d));
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = random_below(4) ? 1 : 2;
  for (int d : order) {
    strides[size_t(d)] = sizes[size_t(d)] > 1 || random_below(2) ? stride : random_below(9);   // torch's are any where there is one element
    stride *= sizes[size_t(d)] + !random_below(8);
  }
  return strides;
}

using Offsets = std::array<int64_t, max_operands>;    // of one element of each operand

// In the order of the parameter's memory.
std::vector<Offsets> naive_offsets(const std::vector<int64_t>& sizes, const std::vector<int64_t>* strides) {
  std::vector<Offsets> found = {{}};
  for (size_t d = 0; d < sizes.size(); d++) {
    std::vector<Offsets> next;
    for (const Offsets& offsets : found)
      for (int64_t i = 0; i < sizes[d]; i++) {
        next.push_back(offsets);
        for (int k = 0; k < max_operands; k++) next.back()[size_t(k)] += strides[k].empty() ? 0 : i * strides[k][d];
      }
    found = next;
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<Offsets> offsets_of(const Layout& layout, int64_t numel) {
  std::vector<Offsets> found;
  for (int64_t i = 0; i < numel; i++) {
    Offsets& offsets = found.emplace_back();
    for (int k = 0; k < max_operands; k++) {
      offsets[size_t(k)] = 0;
      int64_t rest = i;
      for (int d = layout.ndim - 1; d >= 0; rest /= layout.sizes[d--]) offsets[size_t(k)] += rest % layout.sizes[d] * layout.strides[k][d];
    }
  }
  return found;
}

}  // namespace

void check_layouts() {
  random_state = 1;
  Layouts layouts;
  for (int round = 0; round < 300; round++) {
    struct Case { std::vector<int64_t> sizes, strides[max_operands]; int64_t place; };
    std::vector<Case> made;
    layouts.clear();                              // what is used again is not in the way
    for (int64_t c = random_below(6); c >= 0; c--) {
      Case& one = made.emplace_back();
      for (int64_t d = random_below(5); d > 0; d--) one.sizes.push_back(1 + random_below(4));
      Strides strides = {int(one.sizes.size()), one.sizes.data(), {}};
      for (int k = 0; k < max_operands; k++) {
        if (k > 1 && random_below(2)) continue;
        one.strides[k] = k && random_below(2) ? one.strides[0] : random_strides(one.sizes);
        if (one.sizes.empty()) one.strides[k] = {0};     // of no dimension, but there
        strides.of[k] = one.strides[k].data();
      }
      one.place = layouts.add(strides);
    }
    layouts.finish();
    for (const Case& one : made) {
      const auto expected = naive_offsets(one.sizes, one.strides);
      bool linear = true;
      for (size_t i = 0; i < expected.size(); i++)
        for (int k = 0; k < max_operands; k++) linear = linear && (one.strides[k].empty() || expected[i][size_t(k)] == int64_t(i));
      const Layout* layout = layouts[one.place];
      expect(linear == !layout, "a layout of %zu dimensions is %s", one.sizes.size(), linear ? "made and not needed" : "missing");
      if (!layout) continue;
      expect(offsets_of(*layout, int64_t(expected.size())) == expected, "a layout of %zu dimensions, merged to %d", one.sizes.size(), layout->ndim);
      for (int d = 1; d < layout->ndim; d++) {
        bool merges = true;
        for (int k = 0; k < max_operands; k++) merges = merges && layout->strides[k][d - 1] == layout->strides[k][d] * layout->sizes[d];
        expect(!merges, "dimensions %d and %d of a layout are one", d - 1, d);
      }
    }
  }
}

// ---- overlaps

namespace {

bool naive_overlap(const std::vector<Extent>& extents) {
  for (size_t i = 0; i < extents.size(); i++)
    for (size_t j = 0; j < i; j++)
      if ((extents[i].written || extents[j].written) && extents[i].begin < extents[j].end && extents[j].begin < extents[i].end) return true;
  return false;
}

Extent random_extent(int64_t within, int64_t length, int64_t read_only) {
  const auto begin = uintptr_t(1000 + random_below(within));
  return {begin, begin + uintptr_t(1 + random_below(length)), random_below(read_only) == 0};
}

}  // namespace

void check_extents() {
  random_state = 2;
  Extents extents;
  int seen[2] = {0, 0};
  for (int round = 0; round < 3000; round++) {
    std::vector<Extent> plain;
    const int64_t count = random_below(12), within = 1 + random_below(300), length = 1 + random_below(20), read_only = 1 + random_below(3);
    extents.clear();
    for (int64_t i = 0; i < count; i++) {
      plain.push_back(random_extent(within, length, read_only));
      expect(extents.add(plain.back()) == size_t(i), "place of an extent");
    }
    for (int step = 0; step < 6; step++) {        // some move from step to step, or none
      const bool expected = naive_overlap(plain);
      seen[expected]++;
      expect(extents.overlap() == expected, "overlap of %d extents at step %d", int(count), step);
      for (int64_t i = random_below(3); count && i > 0; i--) {
        const auto at = size_t(random_below(count));
        extents[at] = plain[at] = random_extent(within, length, read_only);
      }
    }
  }
  expect(seen[0] > 1000 && seen[1] > 1000, "too few overlaps, or too many: %d and %d", seen[1], seen[0]);

  // as a comparison on several threads brings them up to date: each its own places
  constexpr size_t many = 3000;
  extents.clear();
  for (size_t i = 0; i < many; i++) extents.add({8 * i, 8 * i + 8, true});
  expect(!extents.overlap(), "neighbours overlap");
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; t++)
    threads.emplace_back([&, t] {
      for (size_t i = t * many / 3; i < (t + 1) * many / 3; i++) extents[i] = {8 * (many - i), 8 * (many - i) + 8, true};
    });
  for (auto& thread : threads) thread.join();
  expect(!extents.overlap(), "neighbours that changed places overlap");
  extents[many / 2].end++;
  expect(extents.overlap(), "one byte more does not overlap");
}

// ---- images

namespace {

// What a plan hands to images, for an algorithm of random size.
struct Step {
  int slots, numbers, scalars;
  Vec<Row> rows;
  Vec<Placed> placed;
  Vec<AnyScalars> all_scalars;
  Vec<Hypers> groups;
};

void change_numbers(Step& step, bool all) {
  for (AnyScalars& scalars : step.all_scalars)
    if (all || !random_below(3)) {
      const uint32_t bits = random_bits();
      std::memcpy(scalars.bytes + 4 * random_below(2 * step.scalars), &bits, 4);
    }
  for (Hypers& hypers : step.groups)
    if (all || !random_below(3)) {
      const int64_t i = random_below(step.numbers);
      hypers.numbers[i] = double(random_bits()), hypers.addresses[i] = random_below(2) ? 16 * int64_t(random_bits()) : 0;
    }
}

void change_addresses(const Step& step, Row& row, Placed& placed) {
  for (int k = 0; k < 2 + step.slots; k++)
    if (k < 2 || random_below(2)) row.data[k] = reinterpret_cast<void*>(uintptr_t(random_bits()));
  for (int k : {average_slot, companion_slot}) row.data[2 + k] = reinterpret_cast<void*>(uintptr_t(random_bits()));
  placed.count_address = random_bits();
}

// As a walk leaves them: group by group, scalars by group, step count and dtype.
void make_rows(Step& step, Images& images) {
  const auto f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16;
  const Kernel kernels[] = {{0, 1, f32, f32, false, false, f32, false, false}, {0, 1, f64, f64, false, false, f64, false, false},
                            {1, 1, f32, f32, false, false, f32, false, false}, {0, 1, f32, f32, true, false, f32, false, false},
                            {0, 3, bf16, f32, false, false, bf16, false, false}, {0, 1, f64, f64, true, false, f64, false, false},
                            {0, 1, f32, f32, false, true, f32, false, false}, {0, 1, f32, f32, true, true, f32, false, false},
                            {0, 3, bf16, f32, false, false, f32, false, false}, {0, 3, bf16, f32, false, false, bf16, true, false},
                            {0, 3, bf16, f32, true, true, f32, true, false}, {0, 3, bf16, f32, false, true, bf16, false, true},
                            {0, 3, bf16, f32, true, false, bf16, false, true}};
  step.rows.clear(), step.placed.clear(), step.all_scalars.resize(size_t(1 + random_below(6))), step.groups.resize(size_t(1 + random_below(4)));
  for (size_t group = 0; group < step.groups.size(); group++)
    for (int64_t i = random_below(8); i > 0; i--) {
      Row& row = step.rows.emplace_back();
      Placed& placed = step.placed.emplace_back();
      row = {}, placed = {};
      row.draws = {random_bits() * 0x123456789u, random_bits(), random_bits()};
      row.numel = random_below(4) ? random_below(3 * chunk) : random_below(4) * chunk;
      placed.group = group, placed.scalars = size_t(random_below(int64_t(step.all_scalars.size())));
      placed.image = images.find(kernels[random_below(int64_t(sizeof kernels / sizeof *kernels))]);
      change_addresses(step, row, placed);
    }
}

// The whole image as kernels/multi_tensor.py describes it, from nothing.
std::vector<int64_t> naive_image(const Step& step, size_t number, const Kernel& kernel, int64_t base, int64_t* table_at, int64_t* hypers_at) {
  std::vector<int64_t> work, table, hypers, numbers, scalars;
  std::vector<char> scalar_bytes;
  const size_t bytes = size_t(step.scalars) * (kernel.param == DType::f64 ? 8 : 4);
  int64_t row = 0, last_scalars = -1, last_group = -1, scalar_row = -1;
  struct Address { size_t at; int64_t number; };
  std::vector<Address> own;                       // of numbers in the image, known once it is laid out
  for (size_t r = 0; r < step.rows.size(); r++) {
    const Placed& placed = step.placed[r];
    if (placed.image != number) continue;
    for (int64_t c = 0; c * chunk < step.rows[r].numel; c++) work.push_back(row << 32 | c);
    row++;
    if (kernel.capturable || last_scalars != int64_t(placed.scalars)) {
      scalar_row++;
      const char* from = step.all_scalars[placed.scalars].bytes;
      scalar_bytes.insert(scalar_bytes.end(), from, from + bytes);
    }
    last_scalars = int64_t(placed.scalars);
    table.push_back(step.rows[r].numel), table.push_back(scalar_row);
    for (int k = 0; k < 2 + step.slots; k++) table.push_back(reinterpret_cast<int64_t>(step.rows[r].data[k]));
    if (kernel.averages) table.push_back(reinterpret_cast<int64_t>(step.rows[r].data[2 + average_slot]));
    if (kernel.companions) table.push_back(reinterpret_cast<int64_t>(step.rows[r].data[2 + companion_slot]));
    const Draws& draws = step.rows[r].draws;
    if (kernel.draws)
      for (const int64_t word : {int64_t(draws.seed), int64_t(draws.position), kernel.capturable ? placed.count_address : int64_t(draws.step)}) table.push_back(word);
    if (!kernel.capturable) continue;
    const Hypers& group = step.groups[placed.group];
    if (last_group != int64_t(placed.group))
      for (int i = 0; i < step.numbers; i++) std::memcpy(&numbers.emplace_back(), &group.numbers[i], 8);
    last_group = int64_t(placed.group);
    hypers.push_back(placed.count_address);
    for (int i = 0; i < step.numbers; i++) {
      if (!group.addresses[i]) own.push_back({hypers.size(), int64_t(numbers.size()) - step.numbers + i});
      hypers.push_back(group.addresses[i]);
    }
  }
  *table_at = int64_t(work.size()), *hypers_at = *table_at + int64_t(table.size());
  for (const Address& address : own) hypers[address.at] = base + 8 * (*hypers_at + int64_t(hypers.size()) + address.number);
  for (const auto* part : {&table, &hypers, &numbers}) work.insert(work.end(), part->begin(), part->end());
  if (!kernel.capturable) {                       // else the device computes them
    work.resize(work.size() + (scalar_bytes.size() + 7) / 8);
    if (!scalar_bytes.empty()) std::memcpy(work.data() + work.size() - (scalar_bytes.size() + 7) / 8, scalar_bytes.data(), scalar_bytes.size());
  }
  return work;
}

// Of an image that is not capturable.
int64_t scalar_rows(const Step& step, size_t number) {
  int64_t count = 0, last = -1;
  for (const Placed& placed : step.placed) {
    if (placed.image != number) continue;
    count += last != int64_t(placed.scalars), last = int64_t(placed.scalars);
  }
  return count;
}

}  // namespace

void check_images() {
  random_state = 3;
  for (int round = 0; round < 200; round++) {
    Step step = {int(random_below(max_slots + 1)), int(1 + random_below(max_numbers)), int(1 + random_below(max_scalars)), {}, {}, {}, {}};
    Images images(step.slots, step.numbers, step.scalars);
    std::vector<std::vector<int64_t>> device;     // what was uploaded
    std::vector<int64_t> bases;
    for (int t = 0; t < 40; t++) {
      const bool same_rows = t && random_below(6), any_change = random_below(4);
      if (!same_rows) make_rows(step, images);
      bool moved = false;
      for (Row& row : step.rows) row.draws.step += any_change;
      if (any_change && same_rows) {
        change_numbers(step, false);
        for (size_t r = 0; r < step.rows.size(); r++) {
          Placed& placed = step.placed[r];
          placed.moved = !random_below(5);
          moved |= placed.moved;
          if (placed.moved) change_addresses(step, step.rows[r], placed);
        }
      } else {
        for (Placed& placed : step.placed) placed.moved = false;
      }
      for (const Image& image : images) moved |= any_change && image.kernel.capturable;   // the numbers of groups were read again
      if (t && !random_below(10)) {               // another buffer, as between graphs and steps outside of them
        const auto at = random_below(int64_t(images.end() - images.begin()) + 1) - 1;
        if (at >= 0 && at < int64_t(device.size())) {
          device[size_t(at)].assign(device[size_t(at)].size(), -1), bases[size_t(at)] = 8 * int64_t(random_bits());
          images.at(size_t(at)).set_buffer(int64_t(device[size_t(at)].size()), bases[size_t(at)]);
        }
      }

      // as Plan::step does
      const bool fit = same_rows && images.fit();
      if (!fit) {
        images.lay_out(step.rows, step.placed);
        size_t at = 0;
        for (Image& image : images) {
          if (device.size() == at) device.emplace_back(), bases.push_back(0);
          if (image.wants_buffer()) {
            device[at].assign(size_t(image.needed), -1), bases[at] = 8 * int64_t(random_bits());
            image.set_buffer(image.needed, bases[at]);
          }
          at++;
        }
        images.fill(step.rows, step.placed, step.all_scalars, step.groups);
      } else {
        images.refresh(step.rows, step.placed, step.all_scalars, step.groups, moved);
      }
      size_t at = 0;
      for (const Image& image : images) {
        int64_t table_at, hypers_at;
        const auto expected = naive_image(step, at, image.kernel, bases[at], &table_at, &hypers_at);
        std::vector<int64_t> words(image.words.begin(), image.words.end());
        const bool is_padded = !image.kernel.capturable && image.kernel.param != DType::f64 && step.scalars * scalar_rows(step, at) % 2;
        auto without_padding = [&](std::vector<int64_t>& of) {   // a last half of a word that nobody reads, if there is one
          if (is_padded && !of.empty()) std::memset(reinterpret_cast<char*>(&of.back()) + 4, 0, 4);
        };
        without_padding(words);
        const bool same_words = words == expected;
        expect(same_words, "image %zu at step %d of round %d, %s", at, t, round, fit ? "refreshed" : "filled");
        expect(image.programs == table_at && image.table_at == table_at && (!image.kernel.capturable || image.hypers_at == hypers_at),
               "places in image %zu at step %d of round %d", at, t, round);
        if (fit && !any_change) expect(image.changed_from >= image.changed_to, "what did not change is uploaded");
        for (int64_t i = image.changed_from; i < image.changed_to; i++) device[at][size_t(i)] = image.words[size_t(i)];
        std::vector<int64_t> uploaded(device[at].begin(), device[at].begin() + std::ptrdiff_t(std::min(device[at].size(), expected.size())));
        without_padding(uploaded);
        const bool same_device = !same_words || uploaded == expected;
        expect(same_device, "the device has not all of image %zu at step %d of round %d", at, t, round);
        at++;
      }
    }
  }
}
