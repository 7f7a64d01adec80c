// The options of param groups: the numbers behind an algorithm's keys, tensors among them, and the scalars of a step made of both.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/ops/rsub.h>

#include <array>
#include <cmath>
#include <tuple>

#include "plan/tensors.h"
#include "step/algorithms.h"
#include "step/image.h"

namespace fastopt {

// ---- hyper-parameters that are tensors: the scalars of a step are then computed with torch's own operations on 0-dim tensors

struct Value {
  double number = 0;
  at::Tensor tensor;                                         // undefined: the value is number
  Value() = default;
  Value(double n) : number(n) {}
  Value(at::Tensor t) : tensor(std::move(t)) {}
  explicit operator double() const { return tensor.defined() ? tensor.item<double>() : number; }
};
inline Value operator-(const Value& a) { return a.tensor.defined() ? Value(a.tensor.neg()) : Value(-a.number); }
inline Value operator+(double a, const Value& b) { return b.tensor.defined() ? Value(b.tensor + a) : Value(a + b.number); }
inline Value operator-(double a, const Value& b) { return b.tensor.defined() ? Value(at::rsub(b.tensor, a)) : Value(a - b.number); }
inline Value operator*(const Value& a, const Value& b) {
  if (!a.tensor.defined() && !b.tensor.defined()) return a.number * b.number;
  if (!a.tensor.defined()) return b.tensor * a.number;
  return b.tensor.defined() ? a.tensor * b.tensor : a.tensor * b.number;
}
inline Value operator/(const Value& a, const Value& b) {
  if (!a.tensor.defined() && !b.tensor.defined()) return a.number / b.number;
  if (!a.tensor.defined()) return b.tensor.reciprocal() * a.number;   // what torch.Tensor.__rtruediv__ does
  return b.tensor.defined() ? a.tensor / b.tensor : a.tensor / b.number;
}
inline Value pow(const Value& a, double b) { return a.tensor.defined() ? Value(a.tensor.pow(b)) : Value(std::pow(a.number, b)); }
template <class T> Value to(const Value& value) {
  return value.tensor.defined() ? Value(value.tensor.to(c10::CppTypeToScalarType<T>::value)) : value;
}

// ---- what the plan needs to know of an algorithm

constexpr int max_keys = 8;

struct Algorithm {
  const char* name;
  bool has_step;
  int keys, slots, numbers, scalars;
  const Key* key;
  const char* const* slot_names;
  unsigned (*used)(const double* numbers);
  void (*compute)(const double* numbers, double t, bool f64, AnyScalars& out);
  void (*compute_from_tensors)(const Value* values, double t, bool f64, AnyScalars& out);
  PyObject *key_names[max_keys], *slot_keys[max_slots];       // interned
};
constexpr size_t algorithm_count = std::tuple_size_v<Algorithms>;
const std::array<Algorithm, algorithm_count>& algorithms();

// ---- the groups of an optimizer

struct Group {
  unsigned used;                                  // bit mask of the state slots that its options call for
  c10::DeviceIndex device;                        // where its numbers on a GPU are, if it is capturable and there are some; else -1
  bool capturable;
  bool tensors;                                   // whether some number is a tensor: it may change and the group does not
};

class Options {
 public:
  explicit Options(const Algorithm& algorithm) : algorithm(algorithm) {}
  void clear() { groups.clear(), hypers_.clear(), numbers.clear(), scalars_.clear(), scalars_of.clear(), values.clear(); }

  // Reads a param group; returns its place. May run code of the user's.
  size_t add(PyObject* dict, size_t at);
  // Reads it again. Whether its state slots and devices are the same, so that what is known of its parameters holds. Takes a group for
  // which is_simple said so, and then runs no code.
  bool read_again(size_t place, PyObject* dict);
  // Whether a param group can be read without a call into Python, and its numbers can change only with it or in a tensor.
  bool is_simple(PyObject* dict) const;

  const Group& operator[](size_t place) const { return groups[place]; }
  const Vec<Hypers>& hypers() const { return hypers_; }

  // The place in scalars() of those of a group at a step count.
  size_t scalars_for(size_t group, double t, bool f64);
  // One step further, of algorithms without step count: any but the first. With the numbers as they are now.
  void advance();
  const Vec<AnyScalars>& scalars() const { return scalars_; }

  // Tensors must not outlive the call that read them.
  void release() { values.clear(); }

 private:
  struct Numbers {
    size_t at;                                    // place in param_groups
    int64_t values;                               // place in `values`, if some number is a tensor of the host; else -1
    double last_t[2];                             // the step counts whose scalars were wanted last, for fp32 and fp64,
    size_t last[2];                               // and their place in `scalars_`
  };
  struct ScalarsOf { size_t group; bool f64; double t; };
  void read(PyObject* dict, size_t at, Group& group, Hypers& hypers, Numbers& numbers);
  void compute(const ScalarsOf& of, AnyScalars& out);

  const Algorithm& algorithm;
  Vec<Group> groups;
  Vec<Hypers> hypers_;                            // one for one
  Vec<Numbers> numbers;                           // one for one
  Vec<AnyScalars> scalars_;
  Vec<ScalarsOf> scalars_of;                      // one for one
  Vec<Value> values;
};

}  // namespace fastopt
