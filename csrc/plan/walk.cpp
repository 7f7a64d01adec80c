// The walk as a whole, and param groups: reading one, and comparing it. Parameters are walk_param.cpp's.
#include "plan/walk.h"

#include "plan/threads.h"

namespace fastopt {

int64_t Walk::checks = 0;

// ---- all of it

void Walk::check(PyObject* self, PyObject* fresh, unsigned extra_state, bool gpu_allowed) {
  checks++;
  clear();
  extra = extra_state;
  refuse_modes();
  read(self, fresh);
  const char* reason = nullptr;
  for (size_t i = 0; i < seen.size(); i++) try {
    if (found[i].outside) throw Outside{found[i].outside};
    if (seen[i].has_grad) check_param(seen[i], found[i], gpu_allowed);
  } catch (const Outside& outside) {              // the others are checked all the same: torch's step would stop half-way
    if (!reason) reason = outside.reason;
  }
  if (reason) throw Outside{reason};
  refuse_shared_state();
  layouts.finish();
}

// Each step would find in it what the one before left; here they are one step.
void Walk::refuse_shared_state() {
  owners.clear();
  for (const SeenParam& own : seen)
    if (own.has_grad && own.entry) owners.push_back({own.entry, own.object});
  std::sort(owners.begin(), owners.end());
  for (size_t i = 1; i < owners.size(); i++)
    if (owners[i].first == owners[i - 1].first && owners[i].second != owners[i - 1].second) throw Outside{"parameters share one state"};
}

bool Walk::compare(PyObject* self, unsigned extra_state, bool resumes) {
  if (seen_gpu_type != gpu_type || extra != extra_state) return false;
  refuse_modes();
  const py::object groups_object = attribute(self, names::param_groups), state_object = attribute(self, names::state);
  PyObject* param_groups = groups_object.ptr();
  if (!PyList_Check(param_groups) || PyList_GET_SIZE(param_groups) != Py_ssize_t(seen_groups.size())) return false;
  if (state_object.ptr() != state || !is_dict(state) || !has_version(state, state_version)) return false;
  states_changed = !state_changes_seen || state_changes_seen != state_changes();
  state_changes_seen = state_changes();
  const bool regrouped_before = resumes && regrouped;
  if (!resumes) moved = false;
  regrouped = false;
  for (size_t g = 0; g < seen_groups.size(); g++)
    if (!compare_group(PyList_GET_ITEM(param_groups, Py_ssize_t(g)), seen_groups[g])) return false;
  if (resumes && regrouped) return false;           // the scalars are of other numbers
  regrouped |= regrouped_before;
  std::atomic<bool> same{true};
  auto compare_share = [&](size_t begin, size_t end) {
    if (!compare_params(begin, end, resumes ? 0 : 1)) same = false;
  };
  if (specs.empty()) share_params(work, seen.size(), compare_share);
  else compare_share(0, seen.size());             // a gradient's Python object is asked for with the GIL
  if (!same || (moved && extents.overlap())) return false;
  if (!resumes) options.advance();
  return true;
}

void Walk::clear() {
  options.clear(), cpu.clear(), gpu.clear(), layouts.clear(), extents.clear();
  seen_groups.clear(), seen.clear(), specs.clear(), found.clear();
  comparable = any_dtensor = false, work = 0, has_f64 = has_small_scalars = false;
}

void Walk::release() {
  options.release();
  if (held.empty()) return;
  fresh_params.clear(), held_tensors.clear();
  if (missing) held.push_back(missing), missing = nullptr;
  for (PyObject* object : held) Py_DECREF(object);
  held.clear();
}

void Walk::bump_dtensors() const {
  if (specs.empty()) return;
  for (const SeenParam& own : seen) {
    if (own.specs < 0 || !own.has_grad) continue;
    impl_of(own.object)->bump_version();
    for (PyObject* tensor : own.state)
      if (tensor) impl_of(tensor)->bump_version();
  }
}

PyObject* Walk::hold(PyObject* borrowed) {
  if (borrowed) held.push_back(Py_NewRef(borrowed));
  return borrowed;
}
TensorImpl* Walk::hold(TensorImpl* borrowed) {
  if (borrowed) held_tensors.push_back(c10::intrusive_ptr<TensorImpl>::reclaim_copy(borrowed));
  return borrowed;
}

// ---- param groups

void Walk::read(PyObject* self, PyObject* fresh) {
  seen_gpu_type = gpu_type;
  comparable = true;
  const py::object groups_object = attribute(self, names::param_groups), state_object = attribute(self, names::state);
  PyObject* param_groups = hold(groups_object.ptr());
  state = hold(state_object.ptr());
  if (!PyList_Check(param_groups) || !is_dict(state)) throw Outside{"param_groups is no list or state no dict"};
  state_version = version_of(state, DictOf::state);   // first the version, then what it stands for: here and below
  state_changes_seen = 0;
  Reader state_reader(state);
  if (fresh && !algorithm.has_step) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(fresh); i++)
      if (PyObject* param = PyList_GET_ITEM(fresh, i); param != Py_None) fresh_params.push_back(hold(param));
    std::sort(fresh_params.begin(), fresh_params.end());
  }
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); g++) read_group(hold(PyList_GET_ITEM(param_groups, g)), size_t(g), state_reader);
}

void Walk::read_group(PyObject* dict, size_t at, Reader& state_reader) {
  const uint64_t version = is_dict(dict) ? version_of(dict, DictOf::group) : 0;
  PyObject* params = is_dict(dict) ? hold(item_of(dict, names::params).ptr()) : nullptr;
  if (!params || !PyList_CheckExact(params)) throw Outside{"a param group is no dict or has no list of params"};
  PyObject* differentiable = hold(item_of(dict, names::differentiable).ptr());
  if (differentiable && is_true(differentiable)) throw Outside{"differentiable=True"};
  comparable = comparable && options.is_simple(dict);
  SeenGroup group = {dict, params, version, 0, seen.size(), -1};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); i++) read_param(hold(PyList_GET_ITEM(params, i)), {at, size_t(i)}, group, state_reader);
  group.count = Py_ssize_t(seen.size() - group.first);
  seen_groups.push_back(std::move(group));
}

bool Walk::compare_group(PyObject* dict, SeenGroup& group) {
  if (dict != group.dict || !is_dict(dict)) return false;
  const bool tensors = group.group >= 0 && options[size_t(group.group)].tensors;
  if (tensors || !has_version(dict, group.version)) {
    if (!options.is_simple(dict)) return false;
    group.version = version_of(dict, DictOf::group), group.params = PyDict_GetItemWithError(dict, names::params);
    if (!group.params || !PyList_CheckExact(group.params)) return false;
    if (group.group >= 0 && !options.read_again(size_t(group.group), dict)) return false;
    regrouped = true;
  }
  return PyList_GET_SIZE(group.params) == group.count;
}

}  // namespace fastopt
