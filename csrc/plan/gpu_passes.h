// The host's half of a pass over GPU tensors: the arrays of kernels/passes.py, and what of them changed since the last call.
//
// Whoever calls has no plan to keep them in. So each thread keeps one image for each stream: what the buffer of that stream holds, which
// fastopt/gpu_passes.py makes and fills. Nothing is shared, and nothing is overwritten before the launches that read it.
#pragma once
#include <c10/core/impl/VirtualGuardImpl.h>

#include "plan/answer.h"
#include "step/image.h"
#include "step/isa.h"

namespace fastopt {

// work, of dtype after dtype; table.
class PassImage {
 public:
  PassImage(c10::Stream stream, bool pairs) : stream(stream), pairs(pairs) {}
  bool serves(c10::Stream other, bool others_pairs) const { return stream == other && pairs == others_pairs; }

  void fill(const Vec<Row>& rows) {
    version++;
    bool current = shapes.size() == rows.size();
    for (size_t r = 0; current && r < rows.size(); r++) current = shapes[r].numel == rows[r].numel && shapes[r].dtype == rows[r].dtype[0];
    if (!current) lay_out(rows);
    changed_from = current ? int64_t(words.size()) : 0, changed_to = current ? 0 : int64_t(words.size());
    for (size_t r = 0; r < rows.size(); r++)
      for (int k = 0; k < 2; k++) {       // one tensor is at both addresses, whatever a pass does with it: passes take turns on it
        const void* data = rows[r].data[k] ? rows[r].data[k] : rows[r].data[1 - k];
        put(table_at + int64_t(r) * 3 + 1 + k, reinterpret_cast<int64_t>(data));
      }
  }

  // `number`: of the pass, or the largest norm. `norm` and `order` are those of a norm.
  py::object answer(const Answers& answers, size_t place, double number, Norm norm, double order) const {
    py::list parts;
    int64_t first = 0;
    for (int d = 0; d < dtype_count; d++) {
      if (!present[d]) continue;
      parts.append(answers.gpu_part({PyLong_FromLong(d), PyLong_FromLongLong(first), PyLong_FromLongLong(programs[d])}));
      first += programs[d];
    }
    int64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const int device = stream.device_index() < 0 ? 0 : stream.device_index();
    void* const address = const_cast<int64_t*>(words.data());
    return answers.gpu_pass({PyLong_FromSize_t(place), PyLong_FromLong(device), parts.release().ptr(), PyLong_FromLongLong(first),
                             PyLong_FromLongLong(table_at), PyLong_FromSize_t(words.size()), PyLong_FromLongLong(changed_from),
                             PyLong_FromLongLong(changed_to), PyLong_FromLongLong(version), PyLong_FromVoidPtr(address),
                             PyLong_FromLongLong(bits), PyLong_FromLong(long(norm)), PyFloat_FromDouble(order)});
  }

 private:
  struct Shape { int64_t numel; DType dtype; };

  void lay_out(const Vec<Row>& rows) {
    shapes.clear(), words.clear();
    for (const Row& row : rows) shapes.push_back({row.numel, row.dtype[0]});
    for (int d = 0; d < dtype_count; d++) {
      const size_t before = words.size();
      for (size_t r = 0; r < rows.size(); r++)
        for (int64_t c = 0; rows[r].dtype[0] == DType(d) && c * chunk < rows[r].numel; c++) words.push_back(int64_t(r) << 32 | c);
      present[d] = std::any_of(shapes.begin(), shapes.end(), [&](const Shape& shape) { return shape.dtype == DType(d); });
      programs[d] = int64_t(words.size() - before);
    }
    table_at = int64_t(words.size());
    words.resize(words.size() + 3 * rows.size());
    for (size_t r = 0; r < rows.size(); r++) words[size_t(table_at) + 3 * r] = rows[r].numel;
  }

  void put(int64_t at, int64_t word) {
    if (words[size_t(at)] == word) return;
    words[size_t(at)] = word;
    changed_from = std::min(changed_from, at), changed_to = std::max(changed_to, at + 1);
  }

  c10::Stream stream;
  bool pairs;
  Vec<Shape> shapes;
  Vec<int64_t> words;                     // as last handed over
  bool present[dtype_count] = {};
  int64_t programs[dtype_count] = {}, table_at = 0;
  int64_t version = 0, changed_from = 0, changed_to = 0;   // what changed since the version before
};

// This thread's image for the current stream of a device, of tensors alone or in pairs, and its place.
inline PassImage& pass_image(c10::Device device, bool pairs, size_t& place) {
  static thread_local Vec<PassImage> images;
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  for (place = 0; place < images.size(); place++)
    if (images[place].serves(stream, pairs)) return images[place];
  images.emplace_back(stream, pairs);
  return images.back();
}

}  // namespace fastopt
