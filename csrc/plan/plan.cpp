// The step: check or compare, count, run. What is checked is walk.h's, and what runs is step/isa.h's.
#include "plan/plan.h"

#include <unordered_map>

#include "plan/threads.h"

namespace fastopt {

py::object Plan::step(PyObject* self, PyObject* fresh, const Extras& extras, const Answers& answers) {
  if (busy) {                                     // another thread is in here, running kernels without the GIL; or the user's code
    Plan other(algorithm);
    other.temporary = true;
    return other.step(self, fresh, extras, answers);
  }
  struct Call {
    Plan& plan;
    explicit Call(Plan& p) : plan(p) { plan.busy = true; }
    ~Call() { plan.alive.clear(), plan.walk.release(), plan.busy = false; }   // what dies may run code that comes back here
  } call(*this);

  // The first half may refuse, and writes nothing.
  const bool resumes = seen == Seen::step_without_norm && extras.norm_known, compares = !fresh && (resumes || seen == Seen::step);
  seen = Seen::nothing, done = false;
  bool unchanged = false, in_turn = false;
  try {
    ask_class(self);
    unchanged = compares && walk.compare(self, extras.state(), resumes);
    if (!unchanged) in_turn = check(self, fresh, extras);
    check_extras(extras);
  } catch (const Outside& outside) {
    return answers.left_to_torch({PyUnicode_FromString(outside.reason)});
  }
  if (walk.missing) return answers.missing({Py_NewRef(walk.missing)});
  const bool on_gpu = !walk.gpu.rows.empty(), comparable = walk.comparable && !in_turn;
  Stages stages = stages_of(extras);
  const bool clips_here = extras.clips && !on_gpu;   // on a GPU it is fastopt/gpu.py that clips, and has the norm
  if (clips_here && !extras.norm_known) read_gradients(stages);
  if (extras.clips && !extras.norm_known && walk.any_dtensor) {
    if (comparable) seen = Seen::step_without_norm;
    return shards(answers);
  }
  const bool images_fit = unchanged && filled && walk.images.fit();
  if (on_gpu && !images_fit) {
    walk.images.lay_out(walk.gpu.rows, walk.gpu.placed);
    if (py::object wanted = wants(answers)) return wanted;
  }
  if (clips_here) clip(extras, stages);
  else norm = {};

  // The second half writes.
  if (fresh && PyList_SetSlice(fresh, 0, PyList_GET_SIZE(fresh), nullptr)) throw python_error();
  walk.bump_dtensors();
  if (on_gpu) fill_images(images_fit), count_steps(walk.gpu, unchanged);   // first: rows of the CPU may run without the GIL
  if (!walk.cpu.rows.empty()) count_steps(walk.cpu, unchanged), run_rows(in_turn, stages);
  if (comparable) seen = Seen::step;
  done = true;
  return on_gpu ? launches(extras, answers) : py::reinterpret_borrow<py::object>(answers.DONE);
}

// A class that replaces a part of torch's step, or adds to it, is not for this library.
void Plan::ask_class(PyObject* self) {
  if (Py_TYPE(self) != type || type->tp_version_tag != type_version || !type_version) {
    torchs_step_because = attribute(attribute(self, names::fastopt).ptr(), names::torchs_step_because)(py::handle(self));
    type = Py_TYPE(self), type_version = type->tp_version_tag;
  }
  if (torchs_step_because.is_none()) return;
  const char* reason = PyUnicode_AsUTF8(torchs_step_because.ptr());
  if (!reason) throw python_error();
  throw Outside{reason};
}

// Everything anew. Whether the rows must be stepped in turn, since parameters share memory.
bool Plan::check(PyObject* self, PyObject* fresh, const Extras& extras) {
  filled = false;
  if (extras.clips) attribute(attribute(self, names::options).ptr(), names::refuse_parts)(py::handle(self));
  walk.check(self, fresh, extras.state(), !temporary);
  if (extras.clips && temporary && walk.any_dtensor)   // processes would not agree whose reduction comes first
    raise(PyExc_RuntimeError, "max_grad_norm: the parameters are DTensors, and another thread is in this optimizer's step: the norm is of all processes, "
                              "which must take it in one order. Nothing was changed. Step it from one thread at a time");
  if (walk.missing) return false;
  const bool in_turn = walk.extents.overlap();
  if (in_turn && !walk.gpu.rows.empty()) throw Outside{"on a GPU, parameters share memory"};
  if (in_turn && walk.any_fresh()) throw Outside{"parameters share memory at their first step"};
  if (in_turn && extras.averages) throw Outside{"parameters share memory, and their averages do not"};
  if (in_turn) count_repeated_steps();
  point_rows();
  return in_turn;
}

void Plan::check_extras(const Extras& extras) {
  if (extras.scales() && !walk.gpu.rows.empty() && !walk.cpu.rows.empty()) throw Outside{"a norm of gradients on CPU and GPU"};
  if (extras.clips && walk.has_f64 && walk.has_small_scalars) throw Outside{"a gradient without dimensions and a norm of another dtype"};
  if (extras.on_gpu && !walk.cpu.rows.empty()) throw Outside{"a scale or a norm on a GPU, of gradients that are not"};
  if (extras.averages) walk.check_averages();
}

// What there is to do beside the update; clipping is added where the norm is known.
Stages Plan::stages_of(const Extras& extras) const {
  Stages stages;
  stages.averages = extras.averages, stages.average_weight = 1 - extras.ema_decay, stages.draws = extras.draws;
  if (extras.unscales) stages.factor[stages.factors++] = extras.inverse_scale;
  return stages;
}

// The gradient pass, after all checks and before anything is written: one read of all gradients. With the GIL, so that no other thread
// changes meanwhile what was checked.
void Plan::read_gradients(const Stages& stages) {
  const Vec<Row>& rows = walk.cpu.rows;
  firsts.clear();
  size_t count = 0;
  for (const Row& row : rows) firsts.push_back(count), count += size_t(tiles_of(row));
  tiles.resize(count);
  if (count) share_reading(*isa, Norm::squares, rows.data(), ends.data(), firsts.data(), rows.size(), tiles.data(), stages);
}

void Plan::clip(const Extras& extras, Stages& stages) {
  double value = extras.norm_known ? extras.norm : total(Norm::squares, tiles);
  bool f64 = false;
  for (const Row& row : walk.cpu.rows) f64 |= row.dtype[1] == DType::f64;
  if (!f64) value = float(value);
  if (extras.error_if_nonfinite && !std::isfinite(value)) raise_nonfinite(2);
  norm = {true, f64, value};
  const double coefficient = clip_coefficient(extras.max_norm, value, f64);
  if (coefficient != 1) stages.factor[stages.factors++] = coefficient;
}

py::object Plan::shards(const Answers& answers) const {
  py::list params;
  walk.for_each([&](PyObject* param, int64_t) { params.append(py::handle(param)); });
  return answers.shards({params.release().ptr()});
}

double Plan::norm_of(const std::vector<size_t>& places) const {
  std::vector<int64_t> rows;                      // of all parameters
  walk.for_each([&](PyObject*, int64_t row) { rows.push_back(row); });
  double squares = 0;
  for (const size_t place : places) {
    const int64_t row = rows.at(place);
    if (row < 0) continue;
    const size_t next = size_t(row) + 1, end = next < firsts.size() ? firsts[next] : tiles.size();
    for (size_t i = firsts[size_t(row)]; i < end; i++) squares += tiles[i];
  }
  return std::sqrt(squares);
}

// A parameter listed twice is stepped twice: its second row is one step further.
void Plan::count_repeated_steps() {
  std::unordered_map<TensorImpl*, int> earlier;
  for (size_t r = 0; r < walk.cpu.rows.size(); r++) {
    Written& w = walk.cpu.written[r];
    Placed& place = walk.cpu.placed[r];
    const int before = earlier[w.param]++;
    for (int i = 0; i < before; i++) w.t = w.count_f64 ? w.t + 1 : float(w.t) + 1.0f;
    if (!before) continue;
    walk.cpu.rows[r].draws.step = uint64_t(w.t);
    place.scalars = walk.options.scalars_for(place.group, algorithm.has_step ? w.t : 2, computes_in_f64(walk.cpu.rows[r].dtype[0]));
  }
}

// What the rows of the CPU need to be run.
void Plan::point_rows() {
  ends.clear();
  int64_t work = 0;
  for (size_t r = 0; r < walk.cpu.rows.size(); r++) {
    Row& row = walk.cpu.rows[r];
    const Placed& place = walk.cpu.placed[r];
    row.layout = walk.layouts[place.layout];
    row.scalars = &walk.options.scalars()[place.scalars];
    work += row.numel + row_cost;
    ends.push_back(work);
  }
}

// Stores the step counts, and tells autograd that the tensors change. Backwards: what was read last is still in the caches, and what is
// read first at the next step will be. Of a parameter listed twice, the later row has the higher count. Where parameters have a count in
// common, each row stores the same.
void Plan::count_steps(const Batch& batch, bool unchanged) {
  auto raise_to = [](auto* count, double t) { if (*count < t) *count = std::remove_reference_t<decltype(*count)>(t); };
  auto count = [&](size_t begin, size_t end) {
    for (size_t r = end; r-- > begin;) {
      const Written& w = batch.written[r];
      w.param->bump_version();
      for (TensorImpl* tensor : w.state)
        if (tensor) tensor->bump_version();
      if (!w.step) continue;
      if (w.count) w.count_f64 ? raise_to(static_cast<double*>(w.count), w.t) : raise_to(static_cast<float*>(w.count), w.t);
      w.step->bump_version();
    }
  };
  if (unchanged) share_params(walk.work, batch.written.size(), count);
  else count(0, batch.written.size());
}

void Plan::run_rows(bool in_turn, const Stages& stages) {
  const Vec<Row>& rows = walk.cpu.rows;
  auto run_all = [&] {
    if (in_turn) share_rows_in_turn(*isa, rows.data(), rows.size(), stages);
    else share_rows(*isa, rows.data(), ends.data(), rows.size(), stages);
  };
  if (walk.work < release_gil) return run_all();
  for (const Written& w : walk.cpu.written) {     // other threads may drop them meanwhile
    alive.push_back(w.param->unsafe_storage()), alive.push_back(w.grad->unsafe_storage());
    for (const TensorImpl* tensor : w.state)
      if (tensor) alive.push_back(tensor->unsafe_storage());
  }
  py::gil_scoped_release released;
  run_all();
}

// ---- the GPU

// Brings the images up to date, and holds the step counts; `images_fit`: their arrays are those of the step before.
void Plan::fill_images(bool images_fit) {
  Batch& gpu = walk.gpu;
  filled = true;
  if (images_fit) walk.images.refresh(gpu.rows, gpu.placed, walk.options.scalars(), walk.options.hypers(), walk.moved || walk.regrouped);
  else walk.images.fill(gpu.rows, gpu.placed, walk.options.scalars(), walk.options.hypers());
  counted.clear();
  for (const Written& w : gpu.written)
    if (w.count) counted.push_back(w.step->unsafe_storage());
}

// The answer if some image has no kernel yet or too small a buffer; else null.
py::object Plan::wants(const Answers& answers) {
  py::list wants;
  size_t place = 0;
  for (const Image& image : walk.images) {
    const Kernel& kernel = image.kernel;
    if (image.wants_buffer())
      wants.append(answers.want({PyLong_FromSize_t(place), PyLong_FromLong(kernel.device), PyLong_FromLong(long(kernel.used)),
                                 PyLong_FromLong(int(kernel.param)), PyLong_FromLong(int(kernel.state)), PyBool_FromLong(kernel.capturable),
                                 PyBool_FromLong(kernel.averages), PyLong_FromLong(int(kernel.grad)),
                                 PyBool_FromLong(kernel.companions), PyBool_FromLong(kernel.draws), PyLong_FromLongLong(image.needed)}));
    place++;
  }
  if (wants.empty()) return py::object();
  return answers.wants({PyList_AsTuple(wants.ptr())});
}

py::object Plan::launches(const Extras& extras, const Answers& answers) {
  py::list launches;
  size_t place = 0;
  for (const Image& image : walk.images) {
    const int64_t prepared = image.kernel.capturable ? image.rows : 0;
    if (image.programs || prepared || (extras.clips && image.rows))   // without elements there is a norm all the same
      launches.append(answers.launch({PyLong_FromSize_t(place), PyLong_FromLongLong(image.programs), PyLong_FromLongLong(image.table_at),
                                      PyLong_FromLongLong(image.scalars_at), PyLong_FromLongLong(image.changed_from),
                                      PyLong_FromLongLong(image.changed_to), PyLong_FromVoidPtr(const_cast<int64_t*>(image.words.data())),
                                      PyLong_FromLongLong(prepared), PyLong_FromLongLong(image.hypers_at)}));
    place++;
  }
  if (launches.empty()) return py::reinterpret_borrow<py::object>(answers.DONE);
  return answers.launches({PyList_AsTuple(launches.ptr())});
}

void Plan::take_back(size_t image) {
  for (size_t r = 0; r < walk.gpu.written.size(); r++) {
    const Written& w = walk.gpu.written[r];
    if (walk.gpu.placed[r].image != image || !w.count) continue;
    if (w.count_f64) *static_cast<double*>(w.count) = w.t - 1;
    else *static_cast<float*>(w.count) = float(w.t - 1);
  }
}

}  // namespace fastopt
