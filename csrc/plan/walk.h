// The walk over an optimizer's live containers: reads them, checks all of it, and leaves rows; or compares them with what it saw at the
// step before, which is enough where that is the same.
//
// Reading may run code of the user's (a __bool__, an equality), which may change anything: what was read is held, and checked only
// afterwards. Checking and comparing run none. No address is followed that was not read or verified in the same step.
#pragma once
#include <atomic>

#include "plan/extras.h"
#include "plan/options.h"
#include "plan/tensors.h"
#include "plan/versions.h"
#include "step/image.h"
#include "step/layout.h"
#include "step/overlap.h"

namespace fastopt {

// What a row writes besides its elements.
struct Written {
  TensorImpl *param, *grad, *state[max_state], *step;
  void* count;                                    // the step count in memory, a double or a float; null if it is on a GPU or there is none
  bool count_f64;
  double t;                                       // what it shall be
};

// The rows of the CPU, or of GPUs.
struct Batch {
  Vec<Row> rows;
  Vec<Written> written;                           // one for one, like placed
  Vec<Placed> placed;
  void clear() { rows.clear(), written.clear(), placed.clear(); }
};

struct Where { size_t group, param; };            // of a parameter, for messages
inline std::ostream& operator<<(std::ostream& out, Where w) { return out << "parameter " << w.param << " of param group " << w.group; }

class Walk {
 public:
  explicit Walk(const Algorithm& algorithm) : options(algorithm), images(algorithm.slots, algorithm.numbers, algorithm.scalars), algorithm(algorithm) {}
  ~Walk() { release(); }

  // Reads and checks everything. `fresh`: a list with the parameters whose slots were made for this step, or null; `extra`: the state
  // that it takes beside the algorithm's slots, Extras::state(). Raises, or throws Outside.
  void check(PyObject* self, PyObject* fresh, unsigned extra, bool gpu_allowed);
  // Whether everything is as `check` saw it, but for numbers and addresses, which are brought up to date. Once it has the
  // containers it runs no code of the user's, so what dicts hold stays alive. `resumes`: in the same step, of which nothing is written yet.
  bool compare(PyObject* self, unsigned extra, bool resumes);
  // What must not outlive the call.
  void release();
  // Tells autograd that DTensors change, of which the rows have the local tensors.
  void bump_dtensors() const;
  // Finds the averages of parameters without gradient, and refuses those that cannot be updated.
  void check_averages();
  // Each parameter, in their order, with its row of the CPU or -1.
  template <class F> void for_each(F f) const {
    for (const SeenParam& own : seen) f(own.object, own.has_grad && !own.on_gpu ? int64_t(own.row) : -1);
  }
  // Whether state was made for this step, of an algorithm without step count.
  bool any_fresh() const { return !fresh_params.empty(); }

  static int64_t checks;                          // counted: tests assert that a step like the one before is only compared with it

  // What the last check concluded, in the order of its walk.
  Options options;
  Images images;
  Batch cpu, gpu;
  Layouts layouts;
  Extents extents;                                // of the parameter and of the gradient of each row
  PyObject* missing = nullptr;                    // [(group, param), ...] that want their state made, or null: then there is nothing else
  bool comparable = false;                        // whether what it saw is all that its conclusions depend on
  int64_t work = 0;                               // of all CPU rows
  std::atomic<bool> moved{false};                 // of a step like the one before: whether some row has
  py::object only_averaged;                       // the list that check_averages found, or null
  bool has_f64 = false, has_small_scalars = false;   // among the gradients: fp64, and other ones without dimensions
  bool regrouped = false;                         // whether the numbers of some group were read again
  bool any_dtensor = false;                       // among the parameters, those without gradient too: these are alike in all processes

 private:
  struct SeenGroup {
    PyObject *dict, *params;
    uint64_t version;                             // of dict
    Py_ssize_t count;                             // of params
    size_t first;                                 // place of the first in `seen`
    int64_t group;                                // place in `options`; -1 if no parameter has a gradient
  };
  struct SeenParam {
    PyObject *object, *entry, *state[max_state], *step, *seed;
    PyTypeObject* type;
    uint64_t entry_version;
    c10::DispatchKeySet keys, step_keys;
    caffe2::TypeMeta dtype, grad_dtype, state_dtypes[max_state], step_dtype;
    c10::Device device = at::kCPU;
    bool has_grad, on_gpu;
    size_t row, extents;                          // places in the batch of its device and in `extents`
    int64_t specs;                                // place in `specs` of a DTensor; else -1
  };
  // What reading found of a parameter with a gradient. All of it is held until the end of the call.
  struct Found {
    TensorImpl *operands[max_operands], *step;    // those of a DTensor are its local tensors; null: there is none, or it is no tensor
    const char* outside;                          // why it is not for this library, or null
    bool foreign, entry_is_dict, is_dtensor;
    uint64_t shard;                               // of a DTensor, if it is wanted
    size_t group;
    Where where;
  };
  using Specs = std::array<py::object, max_operands>;   // of a DTensor, its gradient and its state; kept, to be compared by identity

  void clear();
  // Names things so that they stay alive until the end of the call.
  PyObject* hold(PyObject* borrowed);
  TensorImpl* hold(TensorImpl* borrowed);

  void read(PyObject* self, PyObject* fresh);
  void read_group(PyObject* dict, size_t at, Reader& state);
  bool compare_group(PyObject* dict, SeenGroup& seen);
  void refuse_shared_state();

  void read_param(PyObject* object, Where where, SeenGroup& group, Reader& state);
  void read_entry(PyObject* entry, SeenParam& seen, Found& found);
  void read_dtensor(PyObject* object, PyObject* grad, SeenParam& seen, Found& found);
  void check_param(SeenParam& seen, const Found& found, bool gpu_allowed);
  DType check_state(const SeenParam& seen, const Found& found, int k, DType param_dtype) const;
  bool check_count(SeenParam& seen, const Found& found, Batch& batch, bool capturable);
  bool compare_params(size_t begin, size_t end, int steps);
  bool compare_param(PyObject* object, SeenParam& seen, int steps);
  void prefetch(const SeenParam& seen) const;

  void add_missing(const SeenParam& seen, const Found& found);
  // The state of a parameter: a bit mask of tensors and draws_bit, and the name of a tensor.
  unsigned state_of(const Found& found) const {
    const unsigned of_16_bits = has_16_bits(found.operands[0]) ? 0 : 1u << companion_slot | draws_bit;
    return options[found.group].used | (extra & ~of_16_bits);
  }
  PyObject* state_key(int k, const TensorImpl* param) const {
    if (k < max_slots) return algorithm.slot_keys[k];
    return k == average_slot ? names::ema : param->dtype().toScalarType() == at::kBFloat16 ? names::remainder : names::master;
  }
  int64_t layout_of(TensorImpl* const* operands);

  const Algorithm& algorithm;
  unsigned extra = 0;                             // state beside the algorithm's
  c10::DeviceType seen_gpu_type = c10::kCUDA;
  PyObject* state = nullptr;                      // the optimizer's, borrowed from it
  uint64_t state_version = 0, state_changes_seen = 0;
  bool states_changed = false;                    // whether the dicts of the states must be looked at
  Vec<SeenGroup> seen_groups;
  Vec<SeenParam> seen;
  std::vector<Specs> specs;

  // Memory used again; its content is that of one call.
  Vec<Found> found;                               // of the parameters in `seen`, one for one
  Vec<std::pair<PyObject*, PyObject*>> owners;    // of states: the dict, and the parameter
  Vec<PyObject*> held;
  Vec<c10::intrusive_ptr<TensorImpl>> held_tensors;
  Vec<PyObject*> fresh_params;                    // sorted; algorithms without step count need to know
};

}  // namespace fastopt
