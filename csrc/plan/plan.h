// The plan of an optimizer: what it keeps from step to step, and the step itself.
#pragma once
#include "plan/answer.h"
#include "plan/extras.h"
#include "plan/norm.h"
#include "plan/walk.h"

namespace fastopt {

class Plan {
 public:
  explicit Plan(const Algorithm& algorithm) : algorithm(algorithm), walk(algorithm) {}
  // One step of the optimizer; `fresh`: a list with the parameters whose slots were made for it, emptied before anything is written, or
  // null.
  py::object step(PyObject* self, PyObject* fresh, const Extras& extras, const Answers& answers);
  // The norm of all gradients at the last step that clipped, before clipping; undefined if there was none, or on a GPU.
  at::Tensor grad_norm() const { return norm.known ? scalar_tensor(norm.value, norm.f64) : at::Tensor(); }
  // After an answer Shards: the norm of the gradients that are here of some of its parameters, which `places` names.
  double norm_of(const std::vector<size_t>& places) const;
  // The parameters that the last step did not step, since they have no gradient, but which have an average: for once, or None.
  py::object take_only_averaged() {
    const py::object list = std::exchange(walk.only_averaged, {});
    return done && list ? list : py::none();
  }
  // A buffer on the device was made for an image.
  void set_buffer(size_t image, int64_t words, int64_t address) { walk.images.at(image).set_buffer(words, address); }
  // The launch of an image failed: its step counts are what they were.
  void take_back(size_t image);

 private:
  void ask_class(PyObject* self);
  bool check(PyObject* self, PyObject* fresh, const Extras& extras);
  void check_extras(const Extras& extras);
  Stages stages_of(const Extras& extras) const;
  void read_gradients(const Stages& stages);
  void clip(const Extras& extras, Stages& stages);
  py::object shards(const Answers& answers) const;
  void count_repeated_steps();
  void count_steps(const Batch& batch, bool unchanged);
  void point_rows();
  void run_rows(bool in_turn, const Stages& stages);
  void fill_images(bool images_fit);
  py::object wants(const Answers& answers);
  py::object launches(const Extras& extras, const Answers& answers);

  const Algorithm& algorithm;
  Walk walk;
  Vec<int64_t> ends;                              // of the CPU rows: work up to and including each
  PyTypeObject* type = nullptr;                   // of the optimizer, when its class was asked
  unsigned type_version = 0;                      // which changes when the class or a base of it does; 0 is none
  py::object torchs_step_because;                 // what it said: a str or None
  bool busy = false;                              // a step is under way, perhaps without the GIL
  bool temporary = false;                         // gone after one step: nothing for the GPU may point into it
  bool done = false;                              // whether the last step was
  bool filled = false;                            // whether the images are of what the last check found
  // What the walk has to compare the next step with; a step without norm is one that answered Shards.
  enum class Seen { nothing, step, step_without_norm } seen = Seen::nothing;
  struct GradNorm {
    bool known = false, f64;
    double value;
  } norm;
  Vec<size_t> firsts;                             // of the gradient pass: where the tiles of each CPU row begin,
  Vec<double> tiles;                              // and the number that it left of each tile
  Vec<c10::Storage> alive;                        // of a step that runs without the GIL
  Vec<c10::Storage> counted;                      // the step counts that take_back may have to write
};

}  // namespace fastopt
