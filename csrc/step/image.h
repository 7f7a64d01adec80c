// The GPU's half of a step: the arrays of kernels/multi_tensor.py for the rows that one launch serves, and what of them changed.
//
// An image is the host's copy of what lies in a buffer on the device. Making that buffer, uploading and launching are fastopt/gpu.py's.
#pragma once
#include <algorithm>
#include <cstring>
#include <tuple>

#include "counted.h"
#include "rows.h"

namespace fastopt {

constexpr int64_t chunk = 4096;           // elements per program: CHUNK of kernels/multi_tensor.py, which asserts it

// What rows must have in common to be served by one launch.
struct Kernel {
  int device;
  unsigned used;
  DType param, state;
  bool capturable, averages;              // averages: the table has a column for the parameters' running averages,
  DType grad;
  bool companions, draws;                 // and one for their companions, and three for random bits
  bool operator==(const Kernel& other) const {
    auto all = [](const Kernel& k) { return std::tie(k.device, k.used, k.param, k.state, k.capturable, k.averages, k.grad, k.companions, k.draws); };
    return all(*this) == all(other);
  }
};

// The hyper-parameters of a param group: numbers, or addresses of numbers on the device (0: there is none).
struct Hypers {
  double numbers[max_numbers];
  int64_t addresses[max_numbers];
};

// The places of what belongs to a row; the last three are those in its image.
struct Placed {
  size_t group, scalars;
  int64_t layout;                         // -1 if it needs none
  size_t image;                           // of a GPU row, like all that follows
  int64_t count_address;                  // of the step count on the device, for a capturable row
  bool moved;                             // whether an address is another than at the step before
  int64_t table_at, hypers_at, numbers_at;
};

// work, table, scalars; or, if capturable: work, table, hypers, the numbers that hypers of the host point to, and behind the image the
// scalars, which the device computes. Places and sizes are in words of 8 bytes.
struct Image {
  Kernel kernel;
  int64_t capacity = 0, base = 0;         // of its buffer on the device: words that it holds, its address
  Vec<int64_t> words;                     // as last handed over
  int64_t programs = 0, table_at = 0, hypers_at = 0, numbers_at = 0, scalars_at = 0, needed = 0;
  int64_t changed_from = 0, changed_to = 0;
  int64_t rows = 0;
  bool current = false;                   // whether words has the present shapes

  explicit Image(const Kernel& kernel) : kernel(kernel) {}
  bool wants_buffer() const { return rows && needed > capacity; }
  void set_buffer(int64_t words, int64_t address) { capacity = words, base = address, current = false; }

 private:
  friend class Images;
  Vec<int64_t> numels;                    // of the rows in it
  Vec<size_t> scalars;                    // place in the plan's scalars of each row of scalars
  int64_t filled = 0, scalar_rows = 0, groups = 0, last_scalars = -1, last_group = -1;   // while it is laid out or filled
};

class Images {
 public:
  Images(int slots, int numbers, int scalars) : slots(slots), numbers(numbers), scalars(scalars) {}   // of the algorithm

  Vec<Image>::iterator begin() { return images.begin(); }
  Vec<Image>::iterator end() { return images.end(); }
  Image& at(size_t place) { return images.at(place); }

  size_t find(const Kernel& kernel) {
    for (size_t i = 0; i < images.size(); i++)
      if (images[i].kernel == kernel) return i;
    images.emplace_back(kernel);
    return images.size() - 1;
  }

  // Whether every image has the arrays that a step like the one before wants.
  bool fit() const {
    return std::all_of(images.begin(), images.end(), [](const Image& image) { return image.current; });
  }

  // Finds the size and the places of every array.
  void lay_out(const Vec<Row>& rows, const Vec<Placed>& placed) {
    for (Image& image : images) image.rows = 0, start(image);
    for (size_t r = 0; r < rows.size(); r++) {
      Image& image = images[placed[r].image];
      if (size_t(image.rows) == image.numels.size()) image.numels.push_back(-1);
      int64_t& numel = image.numels[size_t(image.rows++)];
      if (numel != rows[r].numel) numel = rows[r].numel, image.current = false;
      enter(image, placed[r]);
    }
    for (Image& image : images) {
      if (size_t(image.rows) != image.numels.size()) image.numels.resize(size_t(image.rows)), image.current = false;
      if (!image.current) {
        image.programs = 0;
        for (int64_t numel : image.numels) image.programs += (numel + chunk - 1) / chunk;
      }
      const bool capturable = image.kernel.capturable;
      image.table_at = image.programs;
      image.hypers_at = image.table_at + image.rows * columns(image);
      image.numbers_at = image.hypers_at + (capturable ? image.rows * (1 + numbers) : 0);
      image.scalars_at = image.numbers_at + (capturable ? image.groups * numbers : 0);
      const int64_t scalar_words = (image.scalar_rows * scalar_bytes(image) + 7) / 8;
      image.needed = image.scalars_at + scalar_words;
      const size_t words = size_t(capturable ? image.scalars_at : image.needed);
      if (image.words.size() != words) image.words.resize(words), image.current = false;
    }
  }

  // Brings every image up to date, after lay_out.
  void fill(const Vec<Row>& rows, Vec<Placed>& placed, const Vec<AnyScalars>& all_scalars, const Vec<Hypers>& groups) {
    for (Image& image : images) {
      const int64_t words = int64_t(image.words.size());
      image.changed_from = image.current ? words : 0, image.changed_to = image.current ? 0 : words;
      start(image);
      image.scalars.clear();
      int64_t row = 0, *work = image.words.data();
      if (!image.current)
        for (int64_t numel : image.numels) {
          for (int64_t c = 0; c * chunk < numel; c++) *work++ = row << 32 | c;
          row++;
        }
      image.current = true;
    }
    for (size_t r = 0; r < rows.size(); r++) {
      Placed& place = placed[r];
      Image& image = images[place.image];
      const int64_t row = image.filled++;
      const bool entered = enter(image, place);
      place.table_at = image.table_at + row * columns(image);
      place.hypers_at = image.hypers_at + row * (1 + numbers);
      place.numbers_at = image.numbers_at + (image.groups - 1) * numbers;
      if (entered && !image.kernel.capturable) image.scalars.push_back(place.scalars), put_scalars(image, image.scalars.size() - 1, all_scalars);
      put(image, place.table_at, rows[r].numel), put(image, place.table_at + 1, image.scalar_rows - 1);
      put_addresses(image, rows[r], place, groups);
    }
  }

  // The same where nothing but addresses, hyper-parameters, step counts and the values of scalars can differ. `moved`: some of the former
  // two do.
  void refresh(const Vec<Row>& rows, const Vec<Placed>& placed, const Vec<AnyScalars>& all_scalars, const Vec<Hypers>& groups, bool moved) {
    for (Image& image : images) {
      image.changed_from = int64_t(image.words.size()), image.changed_to = 0;
      for (size_t row = 0; row < image.scalars.size(); row++) put_scalars(image, row, all_scalars);
    }
    const bool draw = std::any_of(images.begin(), images.end(), [](const Image& image) { return image.kernel.draws; });
    if (!moved && !draw) return;
    for (size_t r = 0; r < rows.size(); r++) {
      Image& image = images[placed[r].image];
      if (placed[r].moved || image.kernel.draws || (moved && image.kernel.capturable)) put_addresses(image, rows[r], placed[r], groups);
    }
  }

 private:
  int64_t columns(const Image& image) const { return 4 + slots + image.kernel.averages + image.kernel.companions + 3 * image.kernel.draws; }
  int64_t scalar_bytes(const Image& image) const { return int64_t(scalars) * (computes_in_f64(image.kernel.param) ? 8 : 4); }

  static void start(Image& image) { image.filled = image.scalar_rows = image.groups = 0, image.last_scalars = image.last_group = -1; }

  // Counts a row's scalars and group, if they are not those of the row before. Whether it has scalars of its own.
  static bool enter(Image& image, const Placed& place) {
    const bool other = image.kernel.capturable || int64_t(place.scalars) != image.last_scalars;
    image.scalar_rows += other, image.last_scalars = int64_t(place.scalars);
    image.groups += int64_t(place.group) != image.last_group, image.last_group = int64_t(place.group);
    return other;
  }

  static void put(Image& image, int64_t at, int64_t word) {
    if (image.words[size_t(at)] == word) return;
    image.words[size_t(at)] = word;
    image.changed_from = std::min(image.changed_from, at), image.changed_to = std::max(image.changed_to, at + 1);
  }

  void put_addresses(Image& image, const Row& row, const Placed& place, const Vec<Hypers>& groups) const {
    for (int k = 0; k < 2 + slots; k++) put(image, place.table_at + 2 + k, reinterpret_cast<int64_t>(row.data[k]));
    int64_t at = place.table_at + 4 + slots;
    if (image.kernel.averages) put(image, at++, reinterpret_cast<int64_t>(row.data[2 + average_slot]));
    if (image.kernel.companions) put(image, at++, reinterpret_cast<int64_t>(row.data[2 + companion_slot]));
    if (image.kernel.draws) {
      put(image, at, int64_t(row.draws.seed)), put(image, at + 1, row.draws.position);
      put(image, at + 2, image.kernel.capturable ? place.count_address : int64_t(row.draws.step));
    }
    if (!image.kernel.capturable) return;
    const Hypers& hypers = groups[place.group];
    put(image, place.hypers_at, place.count_address);
    for (int i = 0; i < numbers; i++) {
      int64_t word;
      std::memcpy(&word, &hypers.numbers[i], sizeof word);
      put(image, place.numbers_at + i, word);
      put(image, place.hypers_at + 1 + i, hypers.addresses[i] ? hypers.addresses[i] : image.base + 8 * (place.numbers_at + i));
    }
  }

  void put_scalars(Image& image, size_t row, const Vec<AnyScalars>& all_scalars) const {
    const size_t size = size_t(scalar_bytes(image)), at = row * size;
    const AnyScalars& from = all_scalars[image.scalars[row]];
    char* const to = reinterpret_cast<char*>(image.words.data() + image.scalars_at) + at;
    if (!std::memcmp(to, &from, size)) return;
    std::memcpy(to, &from, size);
    image.changed_from = std::min(image.changed_from, image.scalars_at + int64_t(at / 8));
    image.changed_to = std::max(image.changed_to, image.scalars_at + int64_t((at + size + 7) / 8));
  }

  const int slots, numbers, scalars;
  Vec<Image> images;
};

}  // namespace fastopt
